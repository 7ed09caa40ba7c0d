"""What one process of `table5_efficiency.py` does: time and memory to the first token, and generation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measuring import Meter
from peers import make_pipelines
from pipelines import ModelSetting, Pipeline, Row
from prefill import metered_merge_steps
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import StoppingCriteria


@dataclass(frozen=True)
class Setting(ModelSetting):
    """How every row of a run is measured."""

    new_tokens: int
    batch_sizes: tuple[int, ...]
    batch_frames: tuple[int, ...]
    merge_schedule: str
    cache_implementation: str | None = None

    def pipelines(self) -> dict[str, Pipeline]:
        """Every row by its name."""
        return make_pipelines(self.make(), self.merge_schedule)


class Stages:
    """Meters the block under `with` in two stages: the front end, until a module returns, and the prefill after it."""

    def __init__(self, device: str, module: nn.Module):
        self.front_end, self.prefill = Meter(device), Meter(device)
        self._module = module
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> Stages:
        self._hook = self._module.register_forward_hook(self._turn)
        self.front_end.__enter__()
        return self

    def _turn(self, *of_the_hook: Any) -> None:
        self.front_end.__exit__()
        self.prefill.__enter__()

    def __exit__(self, kind: type | None, *error: object) -> None:
        self._hook.remove()
        if kind is None:
            self.prefill.__exit__()

    def figures(self) -> Row:
        """Seconds and bytes; peaks are above what was held before the front end."""
        front, prefill = self.front_end, self.prefill
        peaks = {"peak_bytes": None, "front_end_peak_bytes": None, "prefill_peak_bytes": None}
        if front.peak_bytes is not None:
            after = prefill.held_bytes - front.held_bytes + prefill.peak_bytes
            peaks = {
                "peak_bytes": max(front.peak_bytes, after),
                "front_end_peak_bytes": front.peak_bytes,
                "prefill_peak_bytes": after,
            }
        return {
            "seconds": front.seconds + prefill.seconds,
            "wall_seconds": front.wall_seconds + prefill.wall_seconds,
            "front_end_seconds": front.seconds,
            "prefill_seconds": prefill.seconds,
            **peaks,
        }


class TokenClock(StoppingCriteria):
    """Notes when each generated token is on the host; stops nothing."""

    def __init__(self, device: str):
        self.now = time.perf_counter if device == "cuda" else time.process_time
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        input_ids[:, -1].tolist()
        self.times.append(self.now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def first_tokens(pipeline: Pipeline, model: nn.Module, inputs: dict[str, Tensor], device: str) -> tuple[list[int], Any]:
    """From pixels and ids on the host to the first tokens on the host; the cache with them."""
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
    logits, cache = pipeline.prefill(model, inputs)
    return logits[:, -1].argmax(-1).tolist(), cache


def generate(
    model: nn.Module, inputs: dict[str, Tensor], new_tokens: int, device: str, cache_implementation: str | None = None
) -> Row:
    """Greedy generation from pixels and ids on the host, never stopping early: token and request rates."""
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id = None, 0
    clock = TokenClock(device)
    start = clock.now()
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
    options = {"stopping_criteria": [clock], "cache_implementation": cache_implementation}
    model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **options)
    if len(clock.times) != new_tokens:
        raise RuntimeError(f"{len(clock.times)} tokens were generated instead of {new_tokens}; rates mean nothing.")
    clips, first, last = len(inputs["input_ids"]), clock.times[0], clock.times[-1]
    return {
        "generate_seconds": last - start,
        "requests_per_second": clips / (last - start),
        "decode_tokens_per_second": clips * (new_tokens - 1) / (last - first),
    }


@torch.no_grad()
def measure_clip(setting: Setting, pipeline: Pipeline, model: nn.Module, frames: int) -> Row:
    """Measure the first token of one clip after a warm-up: with two frames on a CPU, the same clip on CUDA."""
    device, dtype = setting.device, getattr(torch, setting.dtype)
    inputs = pinned(pipeline.inputs(frames, 1, dtype), device)
    first_tokens(pipeline, model, inputs if device == "cuda" else pipeline.inputs(2, 1, dtype), device)
    with Stages(device, model.get_submodule(pipeline.front_end)) as stages:
        _, cache = first_tokens(pipeline, model, inputs, device)
    row = {**stages.figures(), **cache_figures(cache, inputs), "weight_bytes": count_bytes(model.parameters())}
    del cache
    return {**row, "merge_share": merge_share(pipeline, model, inputs, device) if pipeline.merges else None}


def merge_share(pipeline: Pipeline, model: nn.Module, inputs: dict[str, Tensor], device: str) -> float:
    """The merge steps' share of another prefill, which waits for each of them."""
    with metered_merge_steps(device) as steps, Stages(device, model.get_submodule(pipeline.front_end)) as stages:
        first_tokens(pipeline, model, inputs, device)
    return sum(step.seconds for step in steps) / stages.prefill.seconds


def measure_batches(setting: Setting, pipeline: Pipeline, model: nn.Module, frames: int) -> list[Row]:
    """Measure generation by batch size, after a warm-up with two frames; a batch that cannot run says why."""
    device, dtype = setting.device, getattr(torch, setting.dtype)
    if setting.new_tokens < 2 or not pipeline.generates:
        return []
    generate(model, pipeline.inputs(2, 1, dtype), 2, device)
    rows = []
    for clips in setting.batch_sizes:
        if clips > 1 and frames not in setting.batch_frames:
            continue
        try:
            inputs = pinned(pipeline.inputs(frames, clips, dtype), device)
            how = (model, inputs, setting.new_tokens, device, setting.cache_implementation)
            if setting.cache_implementation == "static":
                generate(*how)  # compiles the steps of these shapes
            rows.append({"batch_size": clips, **generate(*how)})
        except Exception as error:
            rows.append({"batch_size": clips, "failed": failure(error)})
        release(device)
    return rows


def pinned(inputs: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """Inputs that a GPU can fetch while the host goes on."""
    return {name: tensor.pin_memory() for name, tensor in inputs.items()} if device == "cuda" else inputs


def release(device: str) -> None:
    """Give cached memory back, so that what failed before leaves all room."""
    if device == "cuda":
        torch.cuda.empty_cache()


def cache_figures(cache: Any, inputs: dict[str, Tensor]) -> Row:
    """Bytes of the KV cache, and the tokens of a clip that every layer keeps."""
    kept = getattr(cache, "tokens_per_layer", None)  # a plain cache holds every token in every layer
    tokens = len(cache.layers) * [inputs["input_ids"].shape[1]] if kept is None else kept[:, 0].tolist()
    return {
        "kv_bytes": count_bytes(part for layer in cache.layers for part in (layer.keys, layer.values)),
        "input_bytes": count_bytes(inputs.values()),
        "tokens_per_layer": tokens,
    }


def count_bytes(tensors: Any) -> int:
    """Their sum."""
    return sum(tensor.nbytes for tensor in tensors)


def failure(error: Exception) -> str:
    """Why a row has no figures, in a line."""
    is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    return "out of memory" if is_memory else f"{type(error).__name__}: {str(error).strip()[:200]}".replace("\n", " ")


def run_pipeline(setting: Setting, name: str, frames: Sequence[int]) -> list[Row]:
    """Measure one row over numbers of frames; what cannot run says why."""
    pipeline = setting.pipelines()[name]
    try:
        model = pipeline.build(setting.device, getattr(torch, setting.dtype), setting.attention)
    except Exception as error:
        return [{"failed": failure(error)} for _ in frames]
    rows: list[Row] = []
    for count in frames:
        try:
            row = measure_clip(setting, pipeline, model, count)
            rows.append({**row, "batches": measure_batches(setting, pipeline, model, count)})
        except Exception as error:
            rows.append({"failed": failure(error)})
        release(setting.device)
    return rows
