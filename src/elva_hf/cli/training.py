"""`elva train`: run a recipe, or show what it would do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elva_hf.errors_elva import ConfigurationError


def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or path of a YAML file.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Fields to change, such as training.max_steps=9."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Instead of the recipe's output_dir.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, and stop.")] = False,
    processes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="GPUs to plan for, with --dry-run; as launched if not given.")
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List the shipped recipes, and stop.")] = False,
) -> None:
    """Train a model as RECIPE says.

    Prints what it will do, checks all of it, and only then loads weights. On several GPUs start it with accelerate
    launch --config_file zero2.yaml -m elva_hf.cli train RECIPE KEY=VALUE, or with torchrun. Started again, it goes on
    from the last complete checkpoint.
    """
    from elva_hf.training.recipe import list_recipes, read_kind

    if list_all or recipe is None:
        width = max(map(len, list_recipes()))
        for name, line in list_recipes().items():
            print(f"{name:<{width}}  {line}")
        return
    overrides = [*(overrides or ()), *([f"output_dir={out}"] if out is not None else ())]
    kind = read_kind(recipe)
    hint = "model and processor. Try: elva ask --model {folder} VIDEO QUESTION"
    if kind == "toy":
        folder = _train_toy(recipe, overrides, dry_run)
    elif kind == "video_teacher":
        folder = _train_video_teacher(recipe, overrides, dry_run)
        hint = "a teacher. Train with guidance.teacher={folder}"
    else:
        folder = _train_stages(recipe, overrides, dry_run, processes)
    if folder is not None:
        print(f"{folder}: {hint.format(folder=folder)}")


def _train_stages(recipe: str, overrides: list[str], dry_run: bool, processes: int | None) -> Path | None:
    from elva_hf.training.recipe import read_recipe

    read = read_recipe(recipe, overrides)
    if dry_run:
        from elva_hf.training.plan import plan_recipe
        from elva_hf.training.run import num_processes

        for i, plan in enumerate(plan_recipe(read, processes or num_processes())):
            print(*([""] if i else []), *plan.lines(), sep="\n")
        return None
    from elva_hf.training.run import is_main_process, train

    _show_log()
    folder = train(read, print)
    return folder if is_main_process() else None


def _train_toy(recipe: str, overrides: list[str], dry_run: bool) -> Path | None:
    from elva_hf.training import toy

    fields, stages = toy.read_recipe(recipe)
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    if given.keys() - {"output_dir", "seed"} or len(given) < len(overrides):
        raise ConfigurationError(
            f"{recipe}: a toy recipe takes output_dir=... and seed=... only; got {' '.join(overrides)}."
        )
    if dry_run:
        print(f"toy       {fields['preset']}, seed {given.get('seed', fields['seed'])}")
        for stage in stages:
            print(f"stage     {stage.name}: {stage.num_frames} frames, {stage.stop_after or stage.max_steps} steps")
        return None
    folder = Path(given.get("output_dir", f"runs/{Path(recipe).stem}"))
    seed = ["--seed", given["seed"]] if "seed" in given else []
    toy.main(["--recipe", recipe, "--out", str(folder), *seed])
    return folder / "model"


def _train_video_teacher(recipe: str, overrides: list[str], dry_run: bool) -> Path | None:
    from elva_hf.training.recipe import read_body
    from elva_hf.training.run import is_main_process
    from elva_hf.training.video_teacher import VideoTeacherRecipe, train_video_teacher

    body, folder = read_body(VideoTeacherRecipe, recipe, overrides)
    if dry_run:
        print(body)
        return None
    _show_log()
    folder = train_video_teacher(body, Path(folder))
    return folder if is_main_process() else None


def _show_log() -> None:
    """The Trainer's log lines, which the application keeps off the terminal elsewhere."""
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
