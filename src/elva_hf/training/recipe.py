"""Recipes: what a training run is, as data. A file is one stage, or stages that start from each other's model.

Values of the paper are in the files of `training/recipes/`, with their tables; nothing here knows a learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from elva_hf.errors_elva import ConfigurationError
from elva_hf.training.reading import load_yaml, merge, parse_override, put, read_override, read_section
from elva_hf.training.sections import WEIGHT_SOURCES, Stage

T = TypeVar("T")

KINDS = ("stages", "toy", "video_teacher")
FILE_FIELDS = ("kind", "size", "variants", "stages", "output_dir", "resume")


@dataclass(frozen=True)
class Recipe:
    """A file: stages in order, each from the model of the one before; most have one.

    Args:
        name: Of the file.
        stages: At least one.
        output_dir: Where checkpoints and the model go.
        resume: `"auto"` goes on from the last complete checkpoint in `output_dir`; `"never"` starts over.
        where: File, for errors.
    """

    name: str
    stages: tuple[Stage, ...]
    output_dir: str
    resume: Literal["auto", "never"] = "auto"
    where: str = ""

    def stage_dir(self, name: str) -> Path:
        """Folder of the stage of this name: the run's own for the last one, whose model is the run's."""
        return Path(self.output_dir) if name == self.stages[-1].name else Path(self.output_dir) / name


def list_recipes() -> dict[str, str]:
    """Shipped recipes and the first line of their heads."""
    folder = resources.files("elva_hf.training.recipes")
    files = sorted((item for item in folder.iterdir() if item.name.endswith(".yaml")), key=lambda item: item.name)
    return {item.name.removesuffix(".yaml"): item.read_text().splitlines()[0].lstrip("# ") for item in files}


def find_recipe(name_or_path: str) -> Path:
    """The file of a shipped recipe's name, or of a path.

    Raises:
        ConfigurationError: There is neither.
    """
    packaged = resources.files("elva_hf.training.recipes") / f"{name_or_path}.yaml"
    if packaged.is_file():
        return Path(str(packaged))
    path = Path(name_or_path)
    if not path.is_file():
        known = ", ".join(list_recipes())
        raise ConfigurationError(f"no recipe {name_or_path!r}: neither a file nor one of {known}.")
    return path


def read_kind(name_or_path: str) -> str:
    """How a recipe is run: `"stages"`, or by a trainer of its own."""
    path = find_recipe(name_or_path)
    kind = load_yaml(path).get("kind", "stages")
    if kind not in KINDS:
        raise ConfigurationError(f"{path}: kind={kind!r}: expected one of {', '.join(KINDS)}.")
    return kind


def read_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and lay overrides over it.

    Args:
        name_or_path: A name of `training/recipes/`, or a path.
        overrides: `key=value` with dotted keys; `size=7b` chooses a variant. They hold for every stage, or for the one
            that is named: `stages.spatial.training.max_steps=3`.

    Raises:
        ConfigurationError: Naming the file and the field: unknown, missing, of another type, or against another.

    Example:
        >>> read_recipe("stage1_spatial", ["size=1.5b"]).stages[0].model.text_model
        'Qwen/Qwen2-1.5B'
    """
    path = find_recipe(name_or_path)
    where, values = path.name, load_yaml(path)
    pairs = [parse_override(text, where) for text in overrides]
    values = _choose_size(values, [value for keys, value in pairs if keys == ["size"]], where)
    output_dir, resume = values.pop("output_dir", None), values.pop("resume", "auto")
    for keys, value in pairs:
        if keys == ["output_dir"]:
            output_dir = value
        elif keys == ["resume"]:
            resume = value
    pairs = [(keys, value) for keys, value in pairs if keys[0] not in FILE_FIELDS or keys[0] == "stages"]
    raw = _lay_out_stages(values, path.stem, where)
    for keys, value in pairs:
        _override(raw, keys, value, where)
    stages = tuple(read_section(Stage, values, where) for values in raw)
    output_dir = output_dir or f"runs/{path.stem}"
    head = {"name": path.stem, "output_dir": output_dir, "resume": resume}
    checked = read_section(_Head, head, where)
    return Recipe(checked.name, stages, checked.output_dir, checked.resume, where)


def read_body(cls: type[T], name_or_path: str, overrides: Iterable[str] = ()) -> tuple[T, str]:
    """Read a recipe of another `kind`, whose fields are those of a dataclass; returns it and the output folder.

    Args:
        cls: The dataclass.
        name_or_path: A name of `training/recipes/`, or a path.
        overrides: `key=value` with dotted keys.

    Raises:
        ConfigurationError: As `read_recipe`.
    """
    path = find_recipe(name_or_path)
    where, values = path.name, load_yaml(path)
    values.pop("kind", None)
    output_dir = values.pop("output_dir", None) or f"runs/{path.stem}"
    for keys, value in (parse_override(text, where) for text in overrides):
        if keys == ["output_dir"]:
            output_dir = value
        else:
            put(values, keys, read_override(cls, keys, value, where))
    return read_section(cls, values, where), output_dir


@dataclass(frozen=True)
class _Head:
    """Fields of a file that belong to no stage."""

    name: str
    output_dir: str
    resume: Literal["auto", "never"]


def _choose_size(values: dict[str, Any], asked: Sequence[str], where: str) -> dict[str, Any]:
    """The fields of a file with those of the chosen variant laid over them."""
    variants, size = values.pop("variants", None), values.pop("size", None)
    values.pop("kind", None)
    if variants is None:
        if asked:
            raise ConfigurationError(f"{where}: size={asked[-1]}: this recipe has one size only.")
        return values
    size = asked[-1] if asked else size
    if not isinstance(variants, dict) or size not in variants:
        raise ConfigurationError(f"{where}: size={size!r}: expected one of {', '.join(map(str, variants))}.")
    return merge(values, variants[size])


def _lay_out_stages(values: dict[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """Raw fields of each stage; what stands outside `stages` holds for all of them."""
    stages = values.pop("stages", None)
    if stages is None:
        return [{"name": name, **values}]
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigurationError(f"{where}: stages={stages!r}: expected a list of stages, each with a name.")
    names = [stage.get("name") for stage in stages]
    if None in names or len(set(names)) != len(names):
        raise ConfigurationError(f"{where}: stages are named {names}; give each a name of its own.")
    return [merge(values, stage) for stage in stages]


def _override(raw: list[dict[str, Any]], keys: list[str], value: str, where: str) -> None:
    chosen = raw
    if keys[0] == "stages":
        chosen = [stage for stage in raw if len(keys) > 2 and stage["name"] == keys[1]]
        if not chosen:
            named = ", ".join(f"stages.{stage['name']}.FIELD" for stage in raw)
            raise ConfigurationError(f"{where}: {'.'.join(keys)}: expected {named}.")
        keys = keys[2:]
    typed = read_override(Stage, keys, value, where)
    for stage in chosen:
        if keys[0] == "model" and keys[-1] in WEIGHT_SOURCES and typed is not None:
            for name in WEIGHT_SOURCES:
                put(stage, ["model", name], None)
        put(stage, keys, typed)


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Dotted fields in which two nested dictionaries differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [path]
    found = []
    for key in {**one, **other}:
        found += differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    return found


def starting_from(stage: Stage, folder: Path) -> Stage:
    """The stage with its weights from a folder."""
    source = {**dict.fromkeys(WEIGHT_SOURCES), "path": str(folder)}
    return replace(stage, model=replace(stage.model, **source))
