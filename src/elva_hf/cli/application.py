"""The typer application and what all commands share: one-line errors, quiet libraries, progress."""

from __future__ import annotations

import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from elva_hf.errors_elva import ElvaError

HELP = """Ask a video a question, with encoder-free video-language models.

\b
elva ask clip.mp4 "What color is the square?"
elva plan clip.mp4 --preset elva-7b
elva ask --help
"""
BAR_DELAY_SECONDS = 2.0
USAGE_ERROR, UNEXPECTED_ERROR, INTERRUPTED = 2, 1, 130


class ElvaGroup(TyperGroup):
    """Commands whose errors are one line on stderr; `--debug`, anywhere on the line, shows the traceback instead."""

    def main(self, args: Sequence[str] | None = None, standalone_mode: bool = True, **options: Any) -> Any:
        """Parse and run; exit code 2 for what the caller can mend, 1 for what nobody foresaw."""
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        options_end = args.index("--") if "--" in args else len(args)
        debug = "--debug" in args[:options_end]
        if debug:
            args = ["--debug", *(arg for arg in args[:options_end] if arg != "--debug"), *args[options_end:]]
        try:
            code = super().main(args, standalone_mode=False, **options)
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                traceback.print_exc()
            code, message = explain(error)
            print(f"elva: {message}", file=sys.stderr)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code of an error, and what to tell the person in one line."""
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return INTERRUPTED, "interrupted."
    if isinstance(error, ElvaError):
        return USAGE_ERROR, _one_line(str(error))
    if hasattr(error, "format_message"):  # usage errors of click, which typer may carry a copy of
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "elva"
        return USAGE_ERROR, _one_line(f"{error.format_message().rstrip('.')}. Try '{command} --help'.")
    name = type(error).__name__
    return UNEXPECTED_ERROR, _one_line(f"unexpected {name}: {error} (run again with --debug for the traceback).")


def _one_line(text: str) -> str:
    return " ".join(text.split())


app = typer.Typer(cls=ElvaGroup, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.callback(help=HELP)
def root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and libraries' warnings; may stand after a command too.")
    ] = False,
) -> None:
    """Run before every command."""
    if not debug:
        silence_libraries()


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="elva")


def silence_libraries() -> None:
    """Keep the notes and progress bars of transformers and the Hub's client off the terminal."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def busy(label: str, delay: float = BAR_DELAY_SECONDS) -> Iterator[None]:
    """Show on a terminal that work goes on, and for how long, once it has taken more than `delay` seconds."""
    done = threading.Event()
    thread = threading.Thread(target=_show_elapsed, args=(label, delay, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show_elapsed(label: str, delay: float, done: threading.Event) -> None:
    if done.wait(delay) or not sys.stderr.isatty():
        return
    from tqdm import tqdm

    with tqdm(desc=label, bar_format="{desc} [{elapsed}]", leave=False) as bar:
        while not done.wait(0.5):
            bar.refresh()
