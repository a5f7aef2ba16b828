"""How does a YAML file or `--set key=value` become a checked, typed configuration?

One small engine for frozen dataclasses. A field is declared once, with `setting(default, help,
...)`; from that declaration come the type check, the range check, the command line (`--set
sft.lr=1e-3`), the YAML form and the text of `--help`, so they cannot drift apart. A field may be
`int`, `float`, `str`, `bool`, `X | None`, `tuple[X, ...]`, another dataclass or a tuple of one
(`data.sources[1].weight`), and nothing else: a configuration is data, not code.

Every fault is a `ConfigError` that says which field (by its dotted path), what came, and what was
expected. An unknown field is an error that names the nearest valid one; there is no extra-keys-
allowed mode.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from training.paths import expanded

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field, the value and the
    expectation."""


class Text(str):
    """A value typed on the command line: still text, its type decided by the field it is for."""


def setting(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """Declare a field: its default, one sentence for `--help`, and the values it may take."""
    meta = {"help": help, "ge": ge, "gt": gt, "choices": tuple(choices) if choices else None}
    return dataclasses.field(default=default, metadata=meta)


def section(cls: type[T], help: str, **overrides: Any) -> T:
    """Declare a nested group of fields, with other defaults than the class's own where
    `overrides` says so."""
    return dataclasses.field(default_factory=lambda: cls(**overrides), metadata={"help": help})


def check(config: Any) -> None:
    """Check every field of a dataclass built in Python; call it from `__post_init__`.

    Text that begins with ``~`` is a path from a home folder, whatever the field, and is replaced
    by the whole path.

    Raises `ConfigError` naming the class and field.
    """
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        where = f"{type(config).__name__}.{item.name}"
        value = getattr(config, item.name)
        _convert(value, hints[item.name], item.metadata, where)
        if isinstance(value, str):
            object.__setattr__(config, item.name, home(value, where))


def home(value: str, where: str) -> str:
    """`value` with ``~`` expanded; `ConfigError` naming the field `where` if that is nowhere."""
    try:
        return expanded(value)
    except ValueError as error:
        raise ConfigError(f"{where}: got {value!r}, expected a path: {error}") from None


def build(cls: type[T], values: Mapping[str, Any], where: str = "", base: T | None = None) -> T:
    """`values` (nested mappings, as YAML gives them) as a `cls`.

    Fields not named keep `base`'s value, or the default.

    Raises `ConfigError` for an unknown field, a wrong type or a value out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{where or 'configuration'}: got {values!r}, expected a mapping of {_names(cls)}"
        )
    fields = {item.name: item for item in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    hints = typing.get_type_hints(cls)
    current = base if base is not None else cls()
    changed = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise ConfigError(f"{path}: no such field; {_nearest(str(key), list(fields))}")
        if dataclasses.is_dataclass(hints[key]):
            changed[key] = build(hints[key], value, path, getattr(current, key))
        else:
            changed[key] = _convert(value, hints[key], fields[key].metadata, path)
    return dataclasses.replace(current, **changed)  # pyright: ignore[reportArgumentType]


def load(
    cls: type[T], path: str | Path | None, overrides: Sequence[str] = (), base: T | None = None
) -> T:
    """A `cls` from an optional YAML file and `key.sub=value` overrides, in that order, over
    `base`."""
    config = base if base is not None else cls()
    if path is not None:
        config = build(cls, _read(Path(path)), base=config)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r}: expected key=value, for instance sft.lr=1e-3")
        nested: Any = Text(value)
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        config = build(cls, nested, base=config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain YAML-able values, the inverse of `build`."""
    plain = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        if isinstance(value, tuple):
            value = [to_dict(v) if dataclasses.is_dataclass(v) else v for v in value]
        plain[item.name] = value
    return plain


def dump(config: Any) -> str:
    """The configuration as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """One line `field: old -> new` for every field in which two configurations of one class
    differ."""
    for item in dataclasses.fields(old):
        path = f"{where}.{item.name}" if where else item.name
        a, b = getattr(old, item.name), getattr(new, item.name)
        if dataclasses.is_dataclass(a):
            yield from differences(a, b, path)
        elif a != b:
            yield f"{path}: {a!r} -> {b!r}"


def describe(cls: type, default: Any = None, where: str = "") -> Iterator[str]:
    """One entry a field for `--help`: dotted name, type, default, meaning."""
    default = cls() if default is None else default
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        path = f"{where}.{item.name}" if where else item.name
        value = getattr(default, item.name)
        if dataclasses.is_dataclass(hints[item.name]):
            yield f"{path}: {item.metadata['help']}"
            yield from describe(hints[item.name], value, path)
        else:
            yield _line(path, hints[item.name], value, item.metadata)
            if (inner := _section_of(hints[item.name])) is not None:
                yield from describe(inner, where=f"{path}[i]")


def _line(path: str, hint: Any, default: Any, meta: Mapping[str, Any]) -> str:
    shown = list(default) if isinstance(default, tuple) else default
    return f"  {path:<28} {_expected(hint, meta)}; default {shown!r}\n{'':<8}{meta['help']}"


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}") from error
    return {} if values is None else values


class _Loader(yaml.SafeLoader):
    """YAML in which a key that comes twice is an error, not the last one of them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML's; `yaml.constructor.ConstructorError` names the key and both lines."""
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # what is merged in gives way to what is written
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                break  # which PyYAML words itself
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"line {line}: {key!r} again, expected once (line {seen[key]})"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


def _convert(value: Any, hint: Any, meta: Mapping[str, Any], where: str) -> Any:
    """`value` as type `hint`, or a `ConfigError`; the only place that decides what a type
    accepts."""
    fault = ConfigError(f"{where}: got {value!r}, expected {_expected(hint, meta)}")
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, hint):  # pyright: ignore[reportArgumentType]
            raise fault
        return value
    kind, optional = _strip_optional(hint)
    is_tuple = typing.get_origin(kind) is tuple
    if isinstance(value, Text):
        value = _from_text(value, kind, optional, is_tuple, fault)
    if value is None:
        if optional:
            return None
        raise fault
    if is_tuple:
        if not isinstance(value, (list, tuple)):
            raise fault
        inner = typing.get_args(kind)[0]
        return tuple(_element(v, inner, meta, f"{where}[{i}]") for i, v in enumerate(value))
    return _in_range(_scalar(value, kind, fault), meta, fault)


def _element(value: Any, hint: Any, meta: Mapping[str, Any], where: str) -> Any:
    """One value of a tuple; a section is built from its mapping, or taken as it is."""
    if dataclasses.is_dataclass(hint) and not isinstance(value, hint):  # pyright: ignore
        return build(hint, value, where)  # pyright: ignore[reportArgumentType]
    return _convert(value, hint, meta, where)


def _section_of(hint: Any) -> Any:
    """The dataclass that a field is a tuple of, if it is one."""
    inner = [kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)]
    return inner[0] if typing.get_origin(hint) is tuple and inner else None


def _from_text(value: Text, kind: Any, optional: bool, is_tuple: bool, fault: ConfigError) -> Any:
    if optional and value.strip().lower() in ("none", "null", ""):
        return None
    if is_tuple and not value.strip().startswith("["):
        return [Text(v.strip()) for v in value.split(",") if v.strip()]
    if kind is str:
        return str(value)
    try:
        return yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise fault from None


def _scalar(value: Any, kind: type, fault: ConfigError) -> Any:
    if kind is float:
        # YAML 1.1 reads 2e-3 (no dot) as text; people write it, and it can only mean the number
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise fault from None
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise fault
        return float(value)
    if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise fault
    if not isinstance(value, kind):
        raise fault
    return value


def _in_range(value: Any, meta: Mapping[str, Any], fault: ConfigError) -> Any:
    if meta.get("choices") and value not in meta["choices"]:
        raise fault
    if meta.get("ge") is not None and value < meta["ge"]:
        raise fault
    if meta.get("gt") is not None and value <= meta["gt"]:
        raise fault
    return value


def _strip_optional(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return kinds[0], True
    return hint, False


def _expected(hint: Any, meta: Mapping[str, Any]) -> str:
    if dataclasses.is_dataclass(hint):
        return f"a {hint.__name__}"  # pyright: ignore[reportAttributeAccessIssue]
    kind, optional = _strip_optional(hint)
    is_tuple = typing.get_origin(kind) is tuple
    name = typing.get_args(kind)[0].__name__ if is_tuple else kind.__name__
    text = f"one of {', '.join(meta['choices'])}" if meta.get("choices") else name
    text += f" >= {meta['ge']}" if meta.get("ge") is not None else ""
    text += f" > {meta['gt']}" if meta.get("gt") is not None else ""
    return (f"list of {text}" if is_tuple else text) + (" or null" if optional else "")


def _names(cls: type) -> str:
    return ", ".join(item.name for item in dataclasses.fields(cls))


def _nearest(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1)
    nearest = f"nearest is {close[0]!r}; " if close else ""
    return f"{nearest}fields here: {', '.join(valid)}"
