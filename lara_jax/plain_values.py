"""Plain values to typed ones: from dictionaries and from the command line, checked on the way.

build(TrainConfig, {"steps": 20}, "config.train")     TrainConfig(steps=20)
override({"train": {"steps": 500}}, "train.steps=20")  {"train": {"steps": 20}}
"""

import ast
import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any


def build(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    """A frozen dataclass from plain values, recursively.

    Args:
      kind: the dataclass.
      values: by field.
      where: names the values in messages, such as "config.train".

    Raises:
      ValueError: an unknown key (with the nearest known one), a value of the wrong type or range.
    """
    hints = typing.get_type_hints(kind)
    unknown = [key for key in values if key not in hints]
    if unknown:
        raise ValueError(
            f"unknown key {where}.{unknown[0]}{_nearest(unknown[0], hints, f'{where}.')}"
        )
    built = {
        key: build(hints[key], value, f"{where}.{key}")
        if dataclasses.is_dataclass(hints[key])
        else _convert(value, hints[key], f"{where}.{key}")
        for key, value in values.items()
    }
    try:
        return kind(**built)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Checks a plain value against its annotation; lists become tuples, whole numbers floats."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a tuple, got {value!r}")
        kinds = typing.get_args(hint)
        kinds = kinds[:1] * len(value) if Ellipsis in kinds else kinds
        if len(kinds) != len(value):
            raise ValueError(f"{where} must have {len(kinds)} values, got {value!r}")
        return tuple(_convert(v, k, where) for v, k in zip(value, kinds, strict=True))
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        wanted = getattr(hint, "__name__", hint)
        if not dataclasses.is_dataclass(hint):
            raise ValueError(f"{where} must be {wanted}, got {value!r}")
    return value


def _nearest(key: str, known: Iterable[str], prefix: str) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.steps": 10, ...} of nested values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= dotted(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def override(values: dict[str, Any], override: str) -> None:
    """Sets one value in place, read as the type of the value it replaces.

    Args:
      values: nested by section.
      override: "section.key=value", as on the command line.

    Raises:
      ValueError: an unknown key (with the nearest known one), or a value of the wrong type.
    """
    key, separator, text = override.partition("=")
    if not separator:
        raise ValueError(f"--config.{override}: write --config.key=value")
    known = dotted(values)
    if key not in known:
        raise ValueError(f"unknown key config.{key}{_nearest(key, known, 'config.')}")
    *sections, last = key.split(".")
    for section in sections:
        values = values[section]
    values[last] = _parse(text, type(known[key]), f"--config.{key}")


def _parse(text: str, kind: type, where: str) -> Any:
    """A command-line value of the wanted type."""
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{where} must be true or false, got {text!r}")
        return text.lower() == "true"
    if kind is tuple and not text.startswith("("):
        return tuple(_literal(part.strip()) for part in text.split(",") if part.strip())
    value = _literal(text)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} must be {kind.__name__}, got {text!r}")
    return value


def _literal(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
