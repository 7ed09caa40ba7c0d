"""What is no video at all, or not there, or not a file."""

import os
import socket
import zipfile

import av
import numpy as np
from clips_elva import write_sound

from .containers import clip
from .records import Case, Fails
from .writing import EXACT, PLAIN, encode, painted


def content(name, data):
    """A file of these bytes."""

    def build(place):
        (place / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return place / name

    return build


def sound(name):
    return lambda place: write_sound(place / name)


def mp3(place):
    with av.open(str(place / "song.mp3"), "w") as out:
        stream = out.add_stream("libmp3lame", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return place / "song.mp3"


def only_cover(place):
    """Sound with a cover picture."""
    path, plain = place / "song.mp4", write_sound(place / "plain.mp4")
    with av.open(str(plain)) as source, av.open(str(path), "w", options=EXACT) as out:
        cover = out.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = 48, 128, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = out.add_stream_from_template(source.streams.audio[0])
        out.mux(cover.encode(av.VideoFrame.from_ndarray(painted(255), format="rgb24")))
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    plain.unlink()
    return path


def only_subtitles(place):
    text, path = place / "words.srt", place / "words.mkv"
    text.write_text("1\n00:00:00,000 --> 00:00:09,000\nhello\n")
    with av.open(str(text)) as words, av.open(str(path), "w", options=EXACT) as out:
        stream = out.add_stream_from_template(words.streams[0])
        for packet in words.demux():
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    text.unlink()
    return path


def archive(place):
    clip_path = encode(place / "clip.mp4")
    with zipfile.ZipFile(place / "clip.zip", "w") as out:
        out.write(clip_path, "clip.mp4")
    clip_path.unlink()
    return place / "clip.zip"


def folder(place):
    (place / "clip.mp4").mkdir()
    return place / "clip.mp4"


def pipe(place):
    os.mkfifo(place / "clip.mp4")
    return place / "clip.mp4"


def unix_socket(place):
    here = os.getcwd()
    os.chdir(place.folder)  # a socket's path may have 107 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("clip.mp4")
    os.chdir(here)
    return place / "clip.mp4"


def link_to(target):
    def build(place):
        (place / "clip.mp4").symlink_to(target)
        return place / "clip.mp4"

    return build


def given(source):
    """The source itself."""
    return lambda place: source


def at(name):
    """A path in the folder."""
    return lambda place: str(place / name)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 1234567\n"
PAGE = "<!DOCTYPE html><html><head><title>403 Forbidden</title></head><body>Sign in to download.</body></html>\n"
ICON = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
NO_VIDEO, UNREADABLE = Fails("not_a_video"), Fails("unreadable")

CONTENT = [
    Case("empty", "an empty file", content("clip.mp4", b""), Fails("empty")),
    Case("one-byte", "a file of one byte", content("clip.mp4", b"\0"), NO_VIDEO),
    Case("zeros", "20 kB of zeros", content("clip.mp4", bytes(20000)), NO_VIDEO),
    Case("random", "20 kB of random bytes", content("clip.mp4", np.random.default_rng(0).bytes(20000)), NO_VIDEO),
    Case("text", "a text named .mp4", content("clip.mp4", "hello world\n" * 100), NO_VIDEO),
    Case("html", "a web page saved as .mp4", content("clip.mp4", PAGE * 20), NO_VIDEO),
    Case("lfs-pointer", "a Git LFS pointer instead of the file", content("clip.mp4", POINTER), NO_VIDEO),
    Case("json", "JSON named .mp4", content("clip.mp4", '{"error": "not found"}'), NO_VIDEO),
    Case("svg", "an SVG drawing", content("icon.svg", ICON), NO_VIDEO),
    Case("pdf", "the start of a PDF", content("paper.pdf", b"%PDF-1.7\n" + bytes(range(256)) * 8), NO_VIDEO),
    Case("zip", "an mp4 in a ZIP archive", archive, NO_VIDEO),
    Case("wav", "sound only: WAV", sound("sound.wav"), Fails("no_video_stream")),
    Case("aac-mp4", "sound only: AAC in mp4", sound("sound.mp4"), Fails("no_video_stream")),
    Case("mp3", "sound only: MP3", mp3, Fails("no_video_stream")),
    Case("cover-only", "sound with a cover picture", only_cover, Fails("no_video_stream")),
    Case("subtitles-only", "subtitles only, in Matroska", only_subtitles, Fails("no_video_stream")),
    clip("mxf", "clip.mxf", "a container that is not on the list: MXF", "mpeg2video", options={}, expect=NO_VIDEO),
    clip("nut", "clip.nut", "a container that is not on the list: NUT", options=PLAIN, expect=NO_VIDEO),
    clip("yuv4mpeg", "clip.y4m", "a container that is not on the list: YUV4MPEG", "wrapped_avframe", options={},
         form="yuv4mpegpipe", expect=NO_VIDEO),
]  # fmt: skip

PATHS = [
    Case("not-there", "a path that does not exist", at("none.mp4"), Fails("not_found")),
    Case("no-path", "an empty path", given(""), Fails("not_found")),
    Case("tilde", "a path with ~, which only shells know", given("~/clip.mp4"), Fails("not_found")),
    Case("long-name", "a name of 300 letters", at("x" * 300), UNREADABLE),
    Case("not-there-newline", "a path with a line break that does not exist", at("a\nb.mp4"), Fails("not_found")),
    Case("nul", "a path with a NUL byte", given("a\0b.mp4"), UNREADABLE),
    Case("surrogate", "a path that is no Unicode", given("a\udcff.mp4"), Fails("not_found")),
    Case("through-a-file", "a path through a file", lambda place: str(content("a", b"a")(place) / "b.mp4"), UNREADABLE),
    Case("directory", "a directory named .mp4", folder, Fails("directory")),
    Case("fifo", "a named pipe", pipe, Fails("not_regular")),
    Case("socket", "a socket in the file system", unix_socket, Fails("not_regular")),
    Case("device", "/dev/zero", given("/dev/zero"), Fails("not_regular")),
    Case("link-to-a-device", "a symbolic link to /dev/zero", link_to("/dev/zero"), Fails("not_regular")),
    Case("link-to-nowhere", "a symbolic link to nothing", link_to("none.mp4"), Fails("not_found")),
    Case("link-to-itself", "a symbolic link to itself", link_to("clip.mp4"), UNREADABLE),
]  # fmt: skip

CASES = {"Files that are no video": CONTENT, "Paths": PATHS}
