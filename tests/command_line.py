"""Runs of `elva` for the tests of the command line."""

from typer.testing import CliRunner

from elva_hf.cli import app


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="elva")


def succeeds(*args):
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def fails(*args):
    """The one line a mistake prints."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("elva: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def rows(text, name):
    return [line.split(None, 1)[1] for line in text.splitlines() if line.startswith(f"{name} ")]
