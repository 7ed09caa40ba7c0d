"""What `ask`, `plan` and `show` share: options of frames, and loading with errors a person can act on."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elva_hf.cli.application import busy
from elva_hf.errors_elva import CheckpointError, ConfigurationError, ContextOverflowError, ElvaError, VideoError

if TYPE_CHECKING:
    from elva_hf.configuration_elva import VideoDecoderConfig
    from elva_hf.pipeline_elva import ElvaPipeline
    from elva_hf.processing_elva import ElvaProcessor

ADAPTER_FILE = "adapter_config.json"
"""What PEFT writes beside an adapter's weights; the base model is named in it."""

MAX_NEW_TOKENS = 256
"""Most tokens of an answer, unless the command says otherwise."""

Video = Annotated[str, typer.Argument(metavar="VIDEO", help="Video or image file, or, with --allow-urls, https URL.")]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="DIR", help="Checkpoint folder or Hub id; the shipped one if not given."),
]
MergeSchedule = Annotated[
    str | None,
    typer.Option(
        "--merge-schedule",
        metavar="NAME",
        help="How frames merge inside the model: none, paper, table5, or JSON; the checkpoint's own if not given.",
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; the best if not given.")
]

FLAGS = {
    "num_high_res_frames=": "--high ",
    "num_low_res_frames=": "--low ",
    "longest_edge=": "--longest-edge ",
    'overflow="fit"': "--fit",
    "max_visual_tokens": "--max-visual-tokens",
    "max_memory": "--max-memory",
    "allow_urls=True": "--allow-urls",
}
"""How errors name options, and how the command line does."""


def frame_options(
    frames: Annotated[
        int | None, typer.Option("--frames", metavar="N", help="Number of frames, all at high resolution.", min=1)
    ] = None,
    high: Annotated[
        int | None, typer.Option("--high", metavar="N", help="Number of high-resolution frames.", min=0)
    ] = None,
    low: Annotated[
        int | None, typer.Option("--low", metavar="N", help="Number of low-resolution frames.", min=0)
    ] = None,
    fps: Annotated[
        float | None, typer.Option("--fps", metavar="F", help="Frames per second of video, instead of a number.")
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option("--at", metavar="S", help="Frames on screen at these seconds: --at 1,2.5 or --at 1 --at 2.5."),
    ] = None,
    start: Annotated[
        float | None, typer.Option("--start", metavar="S", help="Take nothing before this second.", min=0.0)
    ] = None,
    end: Annotated[
        float | None, typer.Option("--end", metavar="S", help="Take nothing from this second on.", min=0.0)
    ] = None,
    scenes: Annotated[
        bool, typer.Option("--scenes", help="Choose high-resolution frames by scene, not evenly in time.")
    ] = False,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="Tell the model the time of each frame, as text.")
    ] = False,
    longest_edge: Annotated[
        int | None, typer.Option("--longest-edge", metavar="PX", help="Ceiling of a frame's longer side.", min=1)
    ] = None,
    low_res_longest_edge: Annotated[
        int | None,
        typer.Option("--low-res-longest-edge", metavar="PX", help="The same for low-resolution frames.", min=1),
    ] = None,
    max_visual_tokens: Annotated[
        int | None, typer.Option("--max-visual-tokens", metavar="N", help="Most tokens of all frames.", min=1)
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", metavar="SIZE", help="Most memory of all frames, such as 512MB.")
    ] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Take fewer frames where what is asked for does not fit.")] = False,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch VIDEO if it is an https URL.")] = False,
    isolate: Annotated[bool, typer.Option("--isolate", help="Decode in a process that can open nothing else.")] = False,
) -> dict[str, Any]:
    """Options of the command line -> options of the video processor, those that were given.

    Raises:
        ConfigurationError: A time that is no number.
    """
    options = {
        "num_frames": frames,
        "num_high_res_frames": high,
        "num_low_res_frames": low,
        "fps": fps,
        "frame_times": _read_times(at or []),
        "video_start": start,
        "video_end": end,
        "high_res_selection": "scenes" if scenes else None,
        "timestamps": timestamps or None,
        "longest_edge": longest_edge,
        "low_res_longest_edge": low_res_longest_edge,
        "max_visual_tokens": max_visual_tokens,
        "max_memory": max_memory,
        "overflow": "fit" if fit else None,
        "allow_urls": allow_urls or None,
        "isolate": isolate or None,
    }
    return {name: value for name, value in options.items() if value is not None}


def takes_frame_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all options of `frame_options`, where its parameter `options` stands, which gets the result."""
    shared = inspect.signature(frame_options, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters
    parameters = [parameter for name in own for parameter in (shared.values() if name == "options" else [own[name]])]

    def run(**given: Any) -> None:
        options = frame_options(**{name: given.pop(name) for name in shared if name in given})
        with flags_in_errors():
            command(**given, options=options)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in parameters])
    return run


@contextmanager
def flags_in_errors() -> Iterator[None]:
    """Name options in errors as the command line does.

    Raises:
        ContextOverflowError: What was raised inside, in other words; and likewise a `VideoError`.
    """
    try:
        yield
    except (ContextOverflowError, VideoError) as error:
        (message, *_) = error.args
        for name, flag in FLAGS.items():
            message = message.replace(name, flag)
        error.args = (message,)
        raise


def _read_times(texts: Sequence[str]) -> tuple[float, ...] | None:
    try:
        return tuple(float(part) for text in texts for part in text.split(",")) or None
    except ValueError as error:
        raise ConfigurationError(f"--at {' '.join(texts)}: give seconds, such as 1,2.5.") from error


def read_merge_schedule(text: str | None) -> str | list | dict | None:
    """The value of `--merge-schedule`: the name of a preset, or a schedule written as JSON.

    Raises:
        ConfigurationError: It starts as JSON does, and is none.
    """
    if text is None or not text.lstrip().startswith(("[", "{")):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(
            f"--merge-schedule {text} is no JSON ({error}); write the name of a preset, or steps such as "
            '\'[{"layer": 1, "similarity_threshold": 0.6}, {"layer": 3, "target_ratio": 0.5}]\'.'
        ) from error


def find_checkpoint(model: str | None) -> str:
    """The folder or Hub id to load; the shipped checkpoint if none is named.

    Raises:
        CheckpointError: It can only be a folder, and there is none.
    """
    from elva_hf import tiny_checkpoint

    if model is None:
        if not (tiny_checkpoint() / "config.json").is_file():
            raise CheckpointError("the shipped checkpoint is missing from this installation; name one with --model.")
        return str(tiny_checkpoint())
    path = Path(model)
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", ADAPTER_FILE)):
            raise CheckpointError(f"{model} has no config.json; name the folder of a saved model or adapter.")
        return model
    if path.exists():
        raise CheckpointError(f"{model} is a file; name the folder of a saved model.")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise CheckpointError(f"there is no folder {model}; check the path.")
    return model


def find_base_model(checkpoint: str) -> str:
    """The folder or Hub id with the configuration of a checkpoint: its own, or, of an adapter, its base model's."""
    adapter = Path(checkpoint) / ADAPTER_FILE
    if (Path(checkpoint) / "config.json").is_file() or not adapter.is_file():
        return checkpoint
    with explained(checkpoint):
        return json.loads(adapter.read_text())["base_model_name_or_path"]


def load_config(checkpoint: str) -> VideoDecoderConfig:
    """Load the configuration of a checkpoint, or of the base model of an adapter.

    Raises:
        CheckpointError: It belongs to another kind of model.
    """
    from transformers import AutoConfig

    from elva_hf.architectures_elva import ARCHITECTURES

    with explained(checkpoint):
        config = AutoConfig.from_pretrained(find_base_model(checkpoint))
    if config.model_type.replace("_", "-") not in ARCHITECTURES:
        raise CheckpointError(
            f"{checkpoint} is a {config.model_type!r} model, not one of {', '.join(ARCHITECTURES)}; 'elva init' builds "
            "one on a text model."
        )
    return config


def load_processor(checkpoint: str) -> ElvaProcessor:
    """Load the processor of a checkpoint, no weights."""
    from transformers import AutoProcessor

    with explained(checkpoint):
        return AutoProcessor.from_pretrained(checkpoint)


def build_pipeline(checkpoint: str, processor: ElvaProcessor, device: str | None) -> ElvaPipeline:
    """Load a checkpoint's model for answering, on `device` or the best there is.

    Raises:
        ElvaError: There is no such device.
    """
    from transformers import AutoModelForMultimodalLM

    from elva_hf.pipeline_elva import ElvaPipeline

    with explained(checkpoint):
        model = AutoModelForMultimodalLM.from_pretrained(checkpoint, dtype="auto").eval()
    try:
        return ElvaPipeline(model=model, processor=processor, task="video-text-to-text", device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        if device is None:
            raise
        reason = str(error).splitlines()[0]
        raise ElvaError(f"cannot use --device {device}: {reason}. 'elva doctor' shows what there is.") from error


@contextmanager
def explained(checkpoint: str) -> Iterator[None]:
    """Show that loading goes on, and turn the many ways in which a folder is no checkpoint of ours into one error."""
    try:
        with busy(f"loading {checkpoint}"):
            yield
    except ElvaError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"cannot load {checkpoint}: {reason}") from error
