"""Conversion between mappings and nested frozen dataclasses with typed fields; every error names the field."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from lina_jax.errors import UserError


def build(kind: type, given: Any, prefix: str = "") -> Any:
    """A dataclass, with those nested in it, from a mapping. Raises UserError that names the field and its value."""
    if not isinstance(given, Mapping | ml_collections.ConfigDict):
        raise UserError(f"{prefix.rstrip('.') or 'config'}: {given!r} is not a group of fields")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values = {}
    for key in given:
        if key not in fields:
            raise _unknown(prefix + str(key), prefix, str(key), fields)
        value = given[key]
        nested = dataclasses.is_dataclass(hints[key])
        values[key] = build(hints[key], value, f"{prefix}{key}.") if nested else _typed(prefix + key, hints[key], value)
    return kind(**values)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{'model.width': 768, ...}, in field order."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def editable(config: Any) -> dict[str, Any]:
    """The fields as nested dicts; those that are None become placeholders that keep the type for flags."""
    hints, fields = typing.get_type_hints(type(config)), {}
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            fields[name] = editable(value)
        else:
            fields[name] = config_dict.placeholder(_given(hints[name])) if value is None else value
    return fields


def check_name(kind: type, name: str) -> None:
    """Raises UserError unless `name` ('model.width', 'model') is a field of `kind`, or a group of fields."""
    prefix = ""
    for key in name.split("."):
        if not dataclasses.is_dataclass(kind):
            raise UserError(f"unknown config field {name} ({prefix.rstrip('.')} is a field, not a group of them)")
        hints = typing.get_type_hints(kind)
        if key not in hints:
            raise _unknown(name, prefix, key, hints)
        kind, prefix = hints[key], f"{prefix}{key}."


def _unknown(name: str, prefix: str, key: str, known: Collection[str]) -> UserError:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known fields: {', '.join(known)}"
    return UserError(f"unknown config field {name} ({hint})")


def _typed(name: str, hint: Any, value: Any) -> Any:
    """The value, checked against the field's type; only ints become floats, and lists tuples.

    Raises UserError for other types.
    """
    if isinstance(hint, types.UnionType):  # bool | None
        if value is None:
            return None
        hint = _given(hint)
    if isinstance(hint, types.GenericAlias):  # tuple[int, int], tuple[str, ...]
        args = typing.get_args(hint)
        kind, length = args[0], None if args[-1] is Ellipsis else len(args)
        if not isinstance(value, tuple | list) or (length is not None and len(value) != length):
            wanted = "a list" if length is None else f"{length} values"
            raise UserError(f"{name}={value!r}: expected {wanted} of type {kind.__name__}")
        return tuple(_typed(name, kind, v) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise UserError(f"{name}={value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value


def _given(hint: Any) -> type:
    """bool for bool | None."""
    return typing.get_args(hint)[0]
