"""Strict reading: dictionaries from YAML into dataclasses, and `key=value` overrides typed by their field.

Every error names the file and the dotted field, says what was found, what is expected, and what to write instead.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from elva_hf.errors_elva import ConfigurationError

T = TypeVar("T")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, and no key twice.

    Raises:
        ConfigurationError: PyYAML is missing, or the file is not such a file.
    """
    yaml = _import_yaml()
    try:
        values = yaml.load(path.read_text(), Loader=_strict_loader())  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: holds {_kind(values)}; expected the fields of a recipe.")
    return values


def read_section(cls: type[T], values: Any, where: str, path: str = "") -> T:
    """Make a dataclass of a mapping: no unknown field, none missing, none of another type.

    Args:
        cls: A dataclass; its fields may be dataclasses, lists and dictionaries of such, and unions.
        values: What YAML gave.
        where: File, for errors.
        path: Dotted field at which `values` stands, for errors.

    Raises:
        ConfigurationError: Naming `where` and the dotted field.
    """
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"{where}: {path or 'the recipe'} is {_kind(values)}; expected fields of their own.")
    hints, known = _hints(cls), {field.name: field for field in fields(cls)}
    for name in values:
        if name not in known:
            raise ConfigurationError(f"{where}: {_unknown(_join(path, name), name, known)}")
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigurationError(f"{where}: {_join(path, name)} is missing; write {_expected(hints[name])}.")
    given = {name: _convert(value, hints[name], where, _join(path, name)) for name, value in values.items()}
    try:
        return cls(**given)
    except ConfigurationError as error:  # of the dataclass's own checks
        raise ConfigurationError(f"{where}: {path + ': ' if path else ''}{error}") from None


def parse_override(text: str, where: str) -> tuple[list[str], str]:
    """Split `a.b.c=value` into its dotted field and its value.

    Raises:
        ConfigurationError: It is not of that form.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigurationError(f"{where}: override {text!r}: expected key=value, such as training.max_steps=10.")
    return key.split("."), value


def read_override(cls: type, keys: Sequence[str], value: str, where: str) -> Any:
    """What an override's text means for its field: a number for a number, `null` where nothing is allowed.

    Args:
        cls: The dataclass in which the field stands.
        keys: Dotted field, in parts; a part of a dictionary is its key.
        value: Text of the value.
        where: For errors.

    Raises:
        ConfigurationError: There is no such field, or the text is no value of it.
    """
    hint: Any = cls
    for i, key in enumerate(keys):
        hint = _step(hint, key, where, ".".join(keys[: i + 1]))
    return _convert(_from_text(value, hint), hint, where, ".".join(keys))


def put(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set a nested value, making the dictionaries on the way."""
    for key in keys[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = value


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes` laid over them, dictionary by dictionary; `null` removes a section."""
    merged = dict(values)
    for key, change in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, change) if isinstance(old, Mapping) and isinstance(change, Mapping) else change
    return merged


def _import_yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigurationError('recipes are YAML files; pip install "elva-hf[train]" brings PyYAML.') from None
    return yaml


@cache
def _strict_loader() -> type:
    """PyYAML's safe loader, which would otherwise take the last of two equal keys without a word."""
    yaml = _import_yaml()

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            double = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
            if double is not None:
                raise yaml.constructor.ConstructorError(None, None, f"{double!r} stands twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return StrictLoader


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _kind(value: Any) -> str:
    return "empty" if value is None else f"{value!r}"


def _unknown(dotted: str, name: Any, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}."
    return f"{dotted} is no field; {hint}"


def _arms(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _expected(hint: Any) -> str:
    names = []
    for arm in _arms(hint):
        origin = get_origin(arm) or arm
        if origin is Literal:
            names += [repr(value) for value in get_args(arm)]
        elif is_dataclass(arm):
            names.append(f"a section with {', '.join(field.name for field in fields(arm))}")
        else:
            names.append(_NAMES.get(arm) or {list: "a list", tuple: "a list", dict: "a mapping"}.get(origin, "a value"))
    return " or ".join(dict.fromkeys(names))


def _convert(value: Any, hint: Any, where: str, path: str) -> Any:
    """Check `value` against a type hint and return it as that type."""
    arms = _arms(hint)
    for arm in arms:
        if is_dataclass(arm) and isinstance(value, (Mapping, arm)):  # an override comes as what it will be
            return value if isinstance(value, arm) else read_section(arm, value, where, path)
        origin = get_origin(arm) or arm
        if origin in (list, tuple) and isinstance(value, (list, tuple)):
            item = (get_args(arm) or (Any,))[0]
            return origin(_convert(part, item, where, f"{path}.{i}") for i, part in enumerate(value))
        if origin in (dict, Mapping) and isinstance(value, Mapping):
            item = (get_args(arm) or (str, Any))[1]
            return {
                key: _convert(_named(part, key, item), item, where, _join(path, key)) for key, part in value.items()
            }
        if _is_plain(value, arm):
            return float(value) if arm is float and type(value) is int and int not in arms else value
    raise ConfigurationError(f"{where}: {path}={value!r}: expected {_expected(hint)}{_float_hint(value, arms)}.")


def _named(value: Any, key: str, hint: Any) -> Any:
    """A section of a dictionary of sections is named by its key, if it has a name at all."""
    has_name = is_dataclass(hint) and "name" in _hints(hint)
    return {"name": key, **value} if has_name and isinstance(value, Mapping) else value


def _is_plain(value: Any, arm: Any) -> bool:
    if arm is Any:
        return True
    if get_origin(arm) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(arm))
    if arm is float:
        return type(value) in (int, float) and math.isfinite(value)
    return arm in _NAMES and type(value) is arm


def _float_hint(value: Any, arms: tuple[Any, ...]) -> str:
    """What to write for a number that YAML reads as text: `4e-5` is one, `4.0e-5` is a number."""
    if not isinstance(value, str) or not {int, float} & set(arms):
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    mantissa, _, exponent = value.lower().partition("e")
    shown = f"{float(mantissa)}e{int(exponent)}" if exponent else repr(number)
    return f"; YAML reads {value} as text, write {shown}"


def _step(hint: Any, key: str, where: str, dotted: str) -> Any:
    """The type of the field `key` of a value of type `hint`."""
    for arm in _arms(hint):
        if is_dataclass(arm):
            if key not in _hints(arm):
                raise ConfigurationError(f"{where}: {_unknown(dotted, key, _hints(arm))}")
            return _hints(arm)[key]
        if (get_origin(arm) or arm) is dict:
            return (get_args(arm) or (str, Any))[1]
        if arm is Any:
            return Any
    raise ConfigurationError(f"{where}: {dotted} is no field; {dotted.rpartition('.')[0]} has none of its own.")


def _from_text(text: str, hint: Any) -> Any:
    """A value written on the command line, as the first type of the hint that it can be."""
    arms = _arms(hint)
    if text.lower() in ("null", "none") and type(None) in arms:
        return None
    for arm in arms:
        if arm in (int, float):
            try:
                return arm(text)
            except ValueError:
                continue
        if arm is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
    origins = {get_origin(arm) or arm for arm in arms}
    structured = bool({list, tuple, dict} & origins) or any(map(is_dataclass, arms))
    if Any in arms or (structured and text[:1] in ("[", "{")) or not {str, Literal} & origins:
        yaml = _import_yaml()
        try:
            return yaml.load(text, Loader=_strict_loader())
        except yaml.YAMLError:
            return text
    return text
