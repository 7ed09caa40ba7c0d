"""Turn a clip into model inputs once, with one processor, and print what it cost as JSON; `processors.py` runs it.

Every run is a process of its own, in the Python that has what the processor needs. No processor is downloaded: each is
built from its class, with the class's own defaults and a byte-level tokenizer that has its special tokens.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from reading import Cost, cpu_seconds, first_line, versions

Encode = Callable[[str, int], dict[str, Any]]
"""`(path, pixels per frame to come near to)` -> what came out: frames, pixels of all frames, tokens."""

QUESTION = "What happens in this video?"
SIZE = (720, 1280)  # of the clip
SHIMMED = ("nms", "qnms")  # operators of torchvision that its Python code describes on import


# The processors. Each is built when it is chosen, and returns the function that is timed.


def elva(**options: Any) -> Encode:
    """`ElvaProcessor`."""
    from elva_hf import ElvaProcessor

    processor = ElvaProcessor.from_tokenizer(byte_tokenizer())
    time_elva()

    def encode(path: str, pixels: int) -> dict[str, Any]:
        inputs = processor(
            text=f"<video>{QUESTION}", videos=[path], return_tensors="pt", return_metadata=True, **options
        )
        [video] = inputs["video_metadata"]
        patches = inputs["pixel_values_videos"]
        return _outcome(inputs, video.num_frames, patches.numel() // 3, video.num_visual_tokens)

    return encode


def qwen2_5_vl(num_frames: int) -> Encode:
    """`Qwen2_5_VLProcessor`."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    _time_stages(Qwen2VLVideoProcessor, "resize")
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), _qwen_tokenizer(), Qwen2VLVideoProcessor())

    def encode(path: str, pixels: int) -> dict[str, Any]:
        size = {"shortest_edge": 28 * 28, "longest_edge": nearest_area(pixels, 28)}
        return _run_qwen(processor, path, num_frames, size)

    return encode


def qwen3_vl(num_frames: int) -> Encode:
    """`Qwen3VLProcessor`."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    _time_stages(Qwen3VLVideoProcessor, "resize")
    processor = Qwen3VLProcessor(Qwen2VLImageProcessor(), _qwen_tokenizer(), Qwen3VLVideoProcessor(fps=None))

    def encode(path: str, pixels: int) -> dict[str, Any]:
        size = {"shortest_edge": 32 * 32, "longest_edge": num_frames * nearest_area(pixels, 32)}
        return _run_qwen(processor, path, num_frames, size)

    return encode


def gemma4_unified(num_frames: int) -> Encode:
    """`Gemma4UnifiedProcessor`; its frames have one of five sizes, of which the nearest is 70 tokens."""
    from transformers import (
        Gemma4UnifiedAudioFeatureExtractor,
        Gemma4UnifiedImageProcessor,
        Gemma4UnifiedProcessor,
        Gemma4UnifiedVideoProcessor,
    )

    _time_stages(Gemma4UnifiedVideoProcessor, "aspect_ratio_preserving_resize")
    tokens = {f"{name}_token": f"<|{name}|>" for name in ("image", "audio", "boi", "eoi", "boa", "eoa")}
    processor = Gemma4UnifiedProcessor(
        Gemma4UnifiedAudioFeatureExtractor(),
        Gemma4UnifiedImageProcessor(),
        byte_tokenizer(**tokens),
        Gemma4UnifiedVideoProcessor(),
    )

    def encode(path: str, pixels: int) -> dict[str, Any]:
        text = f"{processor.video_token}{QUESTION}"
        videos = {"num_frames": num_frames, "do_sample_frames": True}
        inputs = processor(text=[text], videos=[path], videos_kwargs=videos, return_tensors="pt")
        positions = inputs["video_position_ids"]
        tokens = int((inputs["input_ids"] == processor.video_token_id).sum())
        return _outcome(inputs, len(positions), tokens * 48**2, tokens)

    return encode


def _run_qwen(processor: Any, path: str, num_frames: int, size: dict[str, int]) -> dict[str, Any]:
    text = f"<|vision_start|>{processor.video_token}<|vision_end|>{QUESTION}"
    videos = {"num_frames": num_frames, "size": size, "do_sample_frames": True, "cap_pixels_per_frame": False}
    inputs = processor(text=[text], videos=[path], videos_kwargs=videos, return_tensors="pt")
    [[times, rows, cols]] = inputs["video_grid_thw"].tolist()
    tokens = int((inputs["input_ids"] == processor.video_token_id).sum())
    pixels = inputs["pixel_values_videos"].numel() // 3
    assert pixels == 2 * times * rows * cols * processor.video_processor.patch_size**2
    return _outcome(inputs, 2 * times, pixels, tokens)


def _outcome(inputs: Any, num_frames: int, num_pixels: int, num_tokens: int) -> dict[str, Any]:
    return {
        "num_frames": num_frames,
        "num_pixels": num_pixels,
        "num_visual_tokens": num_tokens,
        "num_tokens": inputs["input_ids"].shape[-1],
    }


PROCESSORS: dict[str, Callable[..., Encode]] = {
    "ELVA": elva,
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": qwen3_vl,
    "Gemma4Unified": gemma4_unified,
}


def nearest_area(pixels: int, factor: int) -> int:
    """A `longest_edge` (an area) with which Qwen's rounding down to `factor` comes nearest to `pixels` a frame."""
    height, width = SIZE
    sides = [(rows, rows * width // height) for rows in range(1, height // factor + 1)]
    rows, _ = min(sides, key=lambda side: abs(side[0] * side[1] * factor**2 - pixels))
    return math.ceil((rows * factor / height) ** 2 * height * width) + factor


def byte_tokenizer(**tokens: str) -> Any:
    """A tokenizer of bytes, with these special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", extra_special_tokens=tokens
    )


def _qwen_tokenizer() -> Any:
    return byte_tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )


# Where the time goes.


class Stages:
    """Seconds spent in wrapped functions, CPU time if `clock` is left alone; what they call of each other left out."""

    def __init__(self) -> None:
        self.clock: Callable[[], float] = cpu_seconds
        self.seconds = {"decode": 0.0, "resize": 0.0, "patchify": 0.0}
        self._inner = [0.0]

    def time(self, owner: Any, name: str, stage: str) -> None:
        """Count what a function or method takes, a generator's too."""
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            outcome = self._count(stage, function, *args, **kwargs)
            return self._step_by_step(stage, outcome) if isinstance(outcome, Iterator) else outcome

        setattr(owner, name, timed)

    def clear(self) -> None:
        """Start again at zero."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    def _step_by_step(self, stage: str, values: Iterator[Any]) -> Iterator[Any]:
        end = object()
        while (value := self._count(stage, next, values, end)) is not end:
            yield value

    def _count(self, stage: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._inner.append(0.0)
        started = self.clock()
        try:
            return function(*args, **kwargs)
        finally:
            spent = self.clock() - started
            self.seconds[stage] += spent - self._inner.pop()
            self._inner[-1] += spent


STAGES = Stages()


def time_elva() -> None:
    """Name the stages of ELVA's processor."""
    from elva_hf import container_elva, decoding_elva, video_processing_elva

    STAGES.time(container_elva.ContainerReader, "__init__", "decode")
    STAGES.time(container_elva.ContainerReader, "read", "decode")
    STAGES.time(decoding_elva, "resize_frame", "resize")
    STAGES.time(video_processing_elva.ElvaVideoProcessor, "decode", "patchify")


def _time_stages(video_processor: Any, resize: str) -> None:
    """Name the stages of a video processor of transformers."""
    STAGES.time(video_processor, "fetch_videos", "decode")
    STAGES.time(video_processor, resize, "resize")
    STAGES.time(video_processor, "_preprocess", "patchify")


def declare_operators() -> bool:
    """Let torchvision be imported beside a torch without CUDA, for which its compiled operators do not load.

    Its Python code stops at the first operator that is missing; the resizing that processors use needs none of them.
    """
    import torch

    if torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in SHIMMED:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    STAGES.library = library  # it lives as long as somebody holds it
    return True


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job: warm up on a small clip, then encode under measurement."""
    try:
        if job["processor"] != "ELVA":
            declare_operators()
        encode = PROCESSORS[job["processor"]](**job["options"])
        encode(job["warm_up"], job["pixels"])
    except Exception as error:  # a processor that does not run here is a result
        return {"unavailable": first_line(error)}
    STAGES.clear()
    with Cost() as cost:
        outcome = encode(job["path"], job["pixels"])
    rest = cost.figures["seconds"] - sum(STAGES.seconds.values())
    return {**cost.figures, **outcome, "stages": {**STAGES.seconds, "rest": rest}}


if __name__ == "__main__":
    print(json.dumps(versions() if sys.argv[1] == "versions" else run(json.loads(sys.argv[1]))))
