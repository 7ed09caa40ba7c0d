"""Where the time of a prefill goes: torch's profiler, with a named range around every module and merging function.

Every operation's own time belongs to the innermost range it ran under; `part_of` says which part of the model that is.
The ranges are hooks on one model and wrapped functions, and all of them are gone when the context ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from elva_hf import attention_elva, decoder_elva

FRONT_LINEAR, FRONT_ATTENTION, FRONT_REST = "front end: linear", "front end: attention", "front end: rest"
PROJECTIONS, ATTENTION, MLP, ELEMENTWISE = "projections", "attention", "MLP", "elementwise"
MERGING, HOST, LM_HEAD, OTHER = "merging", "masks, packing, host", "lm_head", "other"
WAITING = "device waits"
PARTS = (
    *(FRONT_LINEAR, FRONT_ATTENTION, FRONT_REST, PROJECTIONS, ATTENTION, MLP, ELEMENTWISE),
    *(MERGING, HOST, LM_HEAD, OTHER, WAITING),
)
"""Every part, in the order of the tables; the last one on a GPU only."""

FUNCTIONS = (
    (attention_elva, "causal_attention", ATTENTION),
    (decoder_elva, "merge_step", MERGING),
    (decoder_elva, "restore", MERGING),
    (decoder_elva, "read_columns", MERGING),
)
"""Functions that are no modules, where they are called, and their part; two give outputs of the input's length."""

_ROOT, _MODULE, _FUNCTION = "elva profile", "elva module ", "elva function "
_FRONT_END = ("vision", "visual", "projector", "patch_embed")  # parts of names, of whatever stands before a decoder
_LINEAR_OPS = ("linear", "addmm", "mm", "convolution", "conv2d", "conv3d")
_ATTENTION_OPS = ("scaled_dot_product", "flash", "efficient_attention", "softmax", "matmul", "bmm", "einsum")
_LAUNCHES = ("cu", "hip")  # calls of the driver: cudaLaunchKernel, cuLaunchKernelEx, hipLaunchKernel


@dataclass(frozen=True)
class Range:
    """A range of the profile.

    Args:
        name: Qualified name of a module; the part, of a function.
        kind: Class of the module; empty for a function.
    """

    name: str
    kind: str = ""

    @property
    def pieces(self) -> list[str]:
        """The name's pieces between its dots."""
        return self.name.split(".")


def part_of(ranges: Sequence[Range], operation: str) -> str:
    """The part that an operation, or a range's own time, belongs to.

    Args:
        ranges: Those it ran under, outermost first.
        operation: The outermost operation under the innermost range, as `"aten::linear"`; empty for the range itself.
    """
    if not ranges:
        return OTHER
    inner = ranges[-1]
    if not inner.kind:
        return inner.name
    if inner.pieces[-1] == "lm_head":
        return LM_HEAD
    if any(piece.startswith("language") for piece in inner.pieces):
        return _part_of_decoder(ranges, operation)
    if any(word in piece for piece in inner.pieces for word in _FRONT_END):
        return _part_of_front_end(inner, operation)
    return HOST


def _part_of_front_end(inner: Range, operation: str) -> str:
    if _names(operation, _LINEAR_OPS):
        return FRONT_LINEAR
    segments = operation and inner.kind == "ElvaCrossAttention"  # softmax over segments: no operation has its name
    return FRONT_ATTENTION if segments or _contains(operation, _ATTENTION_OPS) else FRONT_REST


def _part_of_decoder(ranges: Sequence[Range], operation: str) -> str:
    inner = ranges[-1]
    in_attention = any("Attention" in outer.kind for outer in ranges)
    if "Norm" in inner.kind or any("rotary" in piece for piece in inner.pieces):
        return ELEMENTWISE
    if "mlp" in inner.pieces:
        return MLP
    if "Attention" in inner.kind and not _names(operation, _LINEAR_OPS):
        return ATTENTION if _contains(operation, _ATTENTION_OPS) else ELEMENTWISE if operation else HOST
    if in_attention:
        return PROJECTIONS
    if "layers" in inner.pieces:
        return ELEMENTWISE if operation else HOST
    return OTHER if "embed" in inner.pieces[-1] else HOST


def _names(operation: str, names: Iterable[str]) -> bool:
    return operation.rpartition("::")[2] in names


def _contains(operation: str, words: Iterable[str]) -> bool:
    return any(word in operation for word in words)


@contextmanager
def named_ranges(model: nn.Module) -> Iterator[None]:
    """A range around every forward of the model's modules, and around the functions that merge."""
    running: list[record_function] = []

    def opens(label: str) -> Callable[..., None]:
        def open_range(*of_the_hook: Any) -> None:
            running.append(record_function(label))
            running[-1].__enter__()

        return open_range

    def close_range(*of_the_hook: Any) -> None:
        running.pop().__exit__(None, None, None)

    with ExitStack() as undo:
        for name, module in model.named_modules():
            label = f"{_MODULE}{name} {type(module).__name__}"
            undo.callback(module.register_forward_pre_hook(opens(label)).remove)
            undo.callback(module.register_forward_hook(close_range, always_call=True).remove)
        for owner, name, part in FUNCTIONS:
            undo.enter_context(mock.patch.object(owner, name, _in_range(getattr(owner, name), part)))
        yield


def _in_range(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"{_FUNCTION}{part}"):
            return function(*args, **kwargs)

    return call


def read_range(event_name: str) -> Range | None:
    """The range that an event of the profile is; None for an operation."""
    if event_name.startswith(_FUNCTION):
        return Range(event_name.removeprefix(_FUNCTION))
    if event_name.startswith(_MODULE):
        name, _, kind = event_name.removeprefix(_MODULE).rpartition(" ")
        return Range(name, kind)
    return None


def profile_call(run: Callable[[], Any], model: nn.Module, device: str) -> dict[str, float]:
    """Profile one call and say where its seconds went, as `share_out`; it must wait for the device itself.

    Args:
        run: A forward of `model`, warmed up.
        model: Whose modules get ranges.
        device: `"cpu"`, or `"cuda"` for the time of kernels instead of operations.
    """
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with named_ranges(model), profile(activities=kinds) as profiler, record_function(_ROOT):
        run()
    return share_out(profiler.events(), device)


def share_out(events: Sequence[Any], device: str) -> dict[str, float]:
    """Seconds of each part that has any; their sum is the wall time of the profiled call.

    On a CPU an operation counts with the time in which none of its children ran, and what passes between operations
    goes to the range it passed in. On CUDA a kernel counts for the operation that launched it, a kernel whose launch
    was not seen for `OTHER`, and what is left of the wall time is `WAITING`.

    Args:
        events: `FunctionEvent` of torch's profiler.
        device: `"cpu"` or `"cuda"`.
    """
    [root] = [event for event in events if event.name == _ROOT and event.device_type == DeviceType.CPU]
    walked = list(_walk(root, (), ""))
    micros: Counter[str] = Counter()
    if device == "cpu":
        for event, part in walked:
            micros[part] += event.self_cpu_time_total
    else:
        micros = _share_out_kernels(events, walked)
        micros[WAITING] = root.cpu_time_total - micros.total()
    return {part: micros[part] / 1e6 for part in PARTS if micros[part]}


def _share_out_kernels(events: Sequence[Any], walked: Sequence[tuple[Any, str]]) -> Counter[str]:
    """Microseconds of kernels by part.

    A kernel has the id of the call that launched it. The profiler files calls under operations; those of Triton, which
    are under none, stand alone, and get their part by the time they came at.
    """
    kernels: Counter[int] = Counter()
    for event in events:
        if event.device_type != DeviceType.CPU and not event.is_user_annotation:
            kernels[event.id] += event.time_range.elapsed_us()
    micros: Counter[str] = Counter()
    for event, part in walked:
        if _launches(event) and event.id in kernels:
            micros[part] += kernels.pop(event.id)
    for event in filter(_launches, events):
        if event.id in kernels:
            start = event.time_range.start
            around = [part for outer, part in walked if outer.time_range.start <= start < outer.time_range.end]
            micros[around[-1] if around else OTHER] += kernels.pop(event.id)
    micros[OTHER] += kernels.total()
    return micros


def _launches(event: Any) -> bool:
    return event.device_type == DeviceType.CPU and event.name.startswith(_LAUNCHES)


def _walk(event: Any, ranges: tuple[Range, ...], operation: str) -> Iterator[tuple[Any, str]]:
    """An event and all under it, outer before inner, with the part of each."""
    found = read_range(event.name)
    if found is not None:
        ranges, operation = (*ranges, found), ""
    elif event.name != _ROOT and not operation:
        operation = event.name
    yield event, part_of(ranges, operation)
    for child in event.cpu_children:
        yield from _walk(child, ranges, operation)
