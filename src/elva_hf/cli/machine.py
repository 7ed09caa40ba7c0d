"""`elva doctor`: what this machine has, and what of it elva-hf can use."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata, util

PACKAGES = (
    "elva-hf",
    "torch",
    "transformers",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "peft",
)
OPTIONAL_PACKAGES = ("accelerate", "flash-attn", "torchvision", "torchcodec")
VIDEO_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "prores", "gif")
CONTAINERS = ("mp4", "matroska", "webm", "mov", "avi", "mpegts", "gif")
GIB = 2**30


def doctor() -> None:
    """Show what this machine can do.

    Versions, codecs, attention kernels, device, memory and the shipped checkpoint: put it into bug reports.
    """
    for title, rows in (
        ("software", _software()),
        ("video", _video()),
        ("attention", _attention()),
        ("hardware", _hardware()),
        ("checkpoint", _checkpoint()),
    ):
        print(f"{title}")
        for name, value in rows:
            print(f"  {name:<18} {value}")


def _software() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        yield package, _version(package) or "MISSING"
    for package in OPTIONAL_PACKAGES:
        yield package, _version(package) or "not installed (optional)"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _video() -> Iterator[tuple[str, str]]:
    import av

    versions = av.library_versions
    yield "av (PyAV)", f"{av.__version__}, FFmpeg {getattr(av, 'ffmpeg_version_info', 'of unknown version')}"
    yield "libavcodec", ".".join(map(str, versions["libavcodec"]))
    yield "decodes", _have(VIDEO_CODECS, {name for name in VIDEO_CODECS if _decodes(name)})
    formats = {name for entry in av.formats_available for name in entry.split(",")}
    yield "opens", _have(CONTAINERS, formats)


def _decodes(codec: str) -> bool:
    import av

    try:
        av.Codec(codec, "r")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def _have(wanted: tuple[str, ...], available: set[str]) -> str:
    missing = [name for name in wanted if name not in available]
    return " ".join(name for name in wanted if name in available) + (f" (not: {' '.join(missing)})" if missing else "")


def _attention() -> Iterator[tuple[str, str]]:
    import torch

    cuda = torch.cuda.is_available()
    flash = util.find_spec("flash_attn") is not None
    yield "sdpa", "usable (default)"
    yield "eager", "usable"
    yield "flex_attention", "usable" if cuda else "needs a CUDA device to be of use"
    yield "flash_attention_2", "usable" if flash and cuda else f"not usable: {_flash_lacks(flash, cuda)}"


def _flash_lacks(flash: bool, cuda: bool) -> str:
    reasons = ((flash, "flash-attn is not installed"), (cuda, "there is no CUDA device"))
    return " and ".join(reason for have, reason in reasons if not have)


def _hardware() -> Iterator[tuple[str, str]]:
    import torch

    from elva_hf.training.precision import cpu_multiplies_bfloat16

    if hasattr(os, "sysconf"):
        yield "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.1f} GiB"
    yield "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}"
    slow = "no products of bfloat16 matrices on the CPU; load and train in float32 there, some ten times faster"
    yield "bfloat16", "usable" if cpu_multiplies_bfloat16() else slow
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{device.name}, {device.total_memory / GIB:.1f} GiB, CUDA {torch.version.cuda}"
    mps = torch.backends.mps.is_available()
    yield "default device", "cuda:0" if torch.cuda.is_available() else "mps" if mps else "cpu"


def _checkpoint() -> Iterator[tuple[str, str]]:
    from elva_hf import tiny_checkpoint

    folder = tiny_checkpoint()
    weights = folder / "model.safetensors"
    found = f"{folder} ({weights.stat().st_size / 1e6:.1f} MB)" if weights.is_file() else f"MISSING from {folder}"
    yield "tiny", found
