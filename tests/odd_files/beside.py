"""Sound clips with other things in the file, strange names, and pictures, still and moving."""

import av
from clips_elva import HEIGHT, WIDTH, write_sound
from PIL import Image

from .containers import ALL, FACTS, clip
from .records import COUNT, RATE, Case, shows
from .writing import AV1, EXACT, H264, box, encode, new_data, painted


def with_sound(place):
    """Video of 32 frames, sound longer than it."""
    sound, path = write_sound(place / "sound.mp4"), place / "clip.mp4"
    with av.open(sound) as other, av.open(path, "w", options=EXACT) as out:
        video = out.add_stream("libx264", rate=RATE, options=H264)
        video.height, video.width, video.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        track = out.add_stream_from_template(other.streams.audio[0])
        template = next(packet for packet in other.demux(audio=0) if packet.size)
        for number in range(2 * COUNT):
            copy = new_data(template, bytes(template))
            copy.pts = copy.dts = number * 1024
            copy.stream = track
            out.mux(copy)
        for number in range(COUNT):
            frame = av.VideoFrame.from_ndarray(painted(number), format="rgb24").reformat(format="yuv420p")
            out.mux(video.encode(frame))
        out.mux(video.encode())
    sound.unlink()
    return path


def two_streams(file):
    """Two video streams: the first counts from 0, the second from 100."""

    def build(place):
        clips = [encode(place / f"{start}.{file}", numbers=range(start, start + COUNT)) for start in (0, 100)]
        path = place / file
        with av.open(clips[0]) as one, av.open(clips[1]) as two, av.open(path, "w", options=EXACT) as out:
            streams = [out.add_stream_from_template(source.streams.video[0]) for source in (one, two)]
            for pair in zip(one.demux(video=0), two.demux(video=0), strict=True):
                for packet, stream in zip(pair, streams, strict=True):
                    if packet.size:
                        packet.stream = stream
                        out.mux(packet)
        for part in clips:
            part.unlink()
        return path

    return build


def with_cover(place):
    """A picture as cover in front of the video."""
    plain, path = encode(place / "plain.mp4"), place / "clip.mp4"
    with av.open(plain) as source, av.open(path, "w", options=EXACT) as out:
        cover = out.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = HEIGHT, WIDTH, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = out.add_stream_from_template(source.streams.video[0])
        out.mux(cover.encode(av.VideoFrame.from_ndarray(painted(255), format="rgb24")))
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    plain.unlink()
    return path


def with_subtitles(place):
    """Subtitles and an attached font beside the video."""
    plain, text, path = encode(place / "plain.mkv"), place / "words.srt", place / "clip.mkv"
    text.write_text("1\n00:00:00,000 --> 00:00:09,000\nhello\n")
    with av.open(plain) as source, av.open(text) as words, av.open(path, "w", options=EXACT) as out:
        lines, stream = (out.add_stream_from_template(other.streams[0]) for other in (words, source))
        out.add_attachment("font.ttf", "application/x-truetype-font", b"no font")
        for other, target in ((words, lines), (source, stream)):
            for packet in other.demux():
                if packet.size:
                    packet.stream = target
                    out.mux(packet)
    plain.unlink(), text.unlink()
    return path


def timecoded(stream):
    stream.metadata["timecode"] = "01:00:00:00"


def open_ended_mdat(place):
    """The box of the frames says "to the end of the file" (size 0), as cameras that stream write it."""
    path = encode(place / "clip.mp4", container={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") - 4
    data[start : start + 4] = bytes(4)
    path.write_bytes(data)
    return path


def junk_behind(place):
    path = encode(place / "clip.mp4")
    path.write_bytes(path.read_bytes() + bytes(range(256)) * 20)
    return path


def strange_boxes(place):
    """Boxes that nobody knows, in front and behind."""
    path = encode(place / "clip.mp4")
    strange = box(b"uuid", bytes(range(200))) + box(b"wxyz", b"???") + box(b"free", bytes(500))
    data = path.read_bytes()
    start = data.index(b"mdat") - 4
    moov = data.index(b"moov") - 4
    path.write_bytes(data[:moov] + strange + data[moov:] + strange)  # offsets of frames stay, as moov is behind mdat
    assert start < moov
    return path


def junk_in_front_of_ts(place):
    path = encode(place / "clip.ts")
    path.write_bytes(bytes(range(100)) + path.read_bytes())
    return path


def renamed(name):
    def build(place):
        return encode(place / "clip.mp4").rename(place / name)

    return build


def linked(place):
    (place / "link.mp4").symlink_to(encode(place / "clip.mp4"))
    return place / "link.mp4"


def avif(place):
    return encode(place / "still.avif", "libsvtav1", numbers=[5], options=AV1)


def picture(name, kind, mode="RGB", **options):
    def build(place):
        Image.fromarray(painted(5)).convert(mode).save(place / name, kind, **options)
        return place / name

    return build


STILL = shows([5], [0.0], facts={"is_image": True, "height": HEIGHT, "width": WIDTH})
STILL_GRAY = shows([5], [0.0], facts={"is_image": True, "height": HEIGHT, "width": WIDTH}, colours=None)
OTHERS = [
    Case("with-longer-sound", "sound that is longer than the video", with_sound, ALL),
    Case("with-two-videos", "two video streams: the first counts", two_streams("clip.mkv"), ALL),
    Case("with-two-videos-mp4", "two video tracks in mp4: the first counts", two_streams("clip.mp4"), ALL),
    clip("with-timecode", "clip.mov", "a track of time codes beside the video", setup=timecoded),
    Case("with-cover", "a cover picture in front of the video", with_cover, ALL),
    Case("with-subtitles", "subtitles and an attached font beside the video", with_subtitles, ALL),
    Case("mp4-open-ended", "mp4 whose frames go on to the end of the file (box of size 0)", open_ended_mdat, ALL),
    Case("mp4-junk-behind", "mp4 with 5 kB of junk behind it", junk_behind, ALL),
    Case("mp4-strange-boxes", "mp4 with boxes that nobody knows", strange_boxes, ALL),
    Case("ts-junk-in-front", "transport stream with 100 bytes of junk in front", junk_in_front_of_ts, ALL),
    Case("named-txt", "mp4 named .txt", renamed("clip.txt"), ALL),
    Case("named-without-suffix", "mp4 without a suffix", renamed("clip"), ALL),
    Case("named-like-a-protocol", "mp4 named concat:a|b.mp4", renamed("concat:a|b.mp4"), ALL),
    Case("named-like-a-pattern", "mp4 named %03d-*?.mp4", renamed("%03d-*?.mp4"), ALL),
    Case("named-with-newline", "mp4 whose name has a line break", renamed("two\nlines.mp4"), ALL),
    Case("named-in-unicode", "mp4 named in Greek, Chinese and emoji", renamed("βίντεο 视频 🎬.mp4"), ALL),
    Case("symbolic-link", "symbolic link to an mp4", linked, ALL),
    Case("png", "PNG", picture("still.png", "PNG"), STILL),
    Case("png-named-mp4", "PNG named .mp4", picture("still.mp4", "PNG"), STILL),
    Case("jpeg", "JPEG", picture("still.jpg", "JPEG", quality=95, subsampling=0), STILL),
    Case("webp", "WebP", picture("still.webp", "WEBP", lossless=True), STILL),
    Case("bmp", "BMP", picture("still.bmp", "BMP"), STILL),
    Case("tiff", "TIFF", picture("still.tif", "TIFF"), STILL),
    Case("png-palette", "PNG with a palette", picture("still.png", "PNG", "P"), STILL_GRAY),
    Case("png-gray", "PNG without colour", picture("still.png", "PNG", "L"), STILL_GRAY),
    Case("png-alpha", "PNG with transparency", picture("still.png", "PNG", "RGBA"), STILL),
    Case("jpeg-cmyk", "JPEG in CMYK", picture("still.jpg", "JPEG", "CMYK"), STILL_GRAY),
    Case("one-frame-gif", "GIF of one frame", picture("still.gif", "GIF"), shows([5], [0.0], colours=None)),
    Case("avif", "AVIF: an AV1 frame in an mp4-like file", avif, shows([5], [0.0])),
]  # fmt: skip


def moving_picture(name, kind, duration=40, **options):
    def build(place):
        frames = [Image.fromarray(painted(number)) for number in range(COUNT)]
        frames[0].save(place / name, kind, save_all=True, append_images=frames[1:], duration=duration, **options)
        return place / name

    return build


UNEVEN = [20 + 10 * (number % 5) for number in range(COUNT)]
STARTS = [sum(UNEVEN[:number]) / 1000 for number in range(COUNT)]
MOVING = [
    Case("animated-webp", "animated WebP", moving_picture("moving.webp", "WEBP", lossless=True), ALL),
    Case("animated-webp-uneven", "animated WebP whose frames stay 20 to 60 ms",
         moving_picture("moving.webp", "WEBP", UNEVEN, lossless=True),
         shows(times=STARTS, facts={**FACTS, "duration": sum(UNEVEN) / 1000})),
    Case("animated-png", "animated PNG", moving_picture("moving.png", "PNG"), ALL),
    Case("gif-uneven", "GIF whose frames stay 20 to 60 ms", moving_picture("moving.gif", "GIF", UNEVEN),
         shows(times=STARTS, colours=24)),
    Case("gif-restoring", "GIF whose frames are wiped before the next (disposal 2)",
         moving_picture("moving.gif", "GIF", disposal=2), shows(colours=24)),
    Case("gif-without-delays", "GIF whose delays are 0: 10 frames a second, as browsers show it",
         moving_picture("moving.gif", "GIF", 0), shows(step=0.1, colours=24)),
]  # fmt: skip

CASES = {"Things beside the video, strange names, pictures": OTHERS, "Moving pictures": MOVING}
