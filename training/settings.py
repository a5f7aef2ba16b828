"""How does a YAML file or `--set key=value` become a checked, typed configuration?

A configuration is a tree of `Section`s, which are pydantic models: a field is declared once, with
its type, range, default and description, and a section may be made of a function's signature
(`arguments_of`), so that what a loss takes is what its section has. This file adds what pydantic
leaves to its user: reading YAML, `--set`, one wording of faults, `--help`.

Every fault is a `ConfigError` that says which field (by its dotted path), what came, and what was
expected. An unknown field is an error that names the nearest valid one. Values are read strictly: a
number is not text and text is no number.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import os
import re
import typing
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

Location = tuple[int | str, ...]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field, the value and the
    expectation."""


class Section(BaseModel):
    """A group of fields: immutable, strict, and without any that are not declared. Text that begins
    with ``~`` is a path from a home folder, whatever the field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _expanded(cls, value: Any, info: ValidationInfo) -> Any:
        return home(value, str(info.field_name)) if isinstance(value, str) else value


S = TypeVar("S", bound=Section)


def setting(default: Any, help: str, **limits: Any) -> Any:
    """Declare a field: its default, one sentence for `--help`, and limits (`ge`, `gt`, `le`,
    `lt`)."""
    return Field(default, description=help, **limits)


def section(cls: type[S], help: str) -> Any:
    """Declare a group of fields."""
    return Field(default_factory=cls, description=help)


def home(value: str, where: str) -> str:
    """`value` with ``~`` or ``~user`` expanded; `ConfigError` naming the field `where` if that is
    nowhere."""
    path = os.path.expanduser(value) if value.startswith("~") else value
    if path.startswith("~"):
        name = value.split("/")[0]
        raise ConfigError(f"{where}: got {value!r}, expected a path: no home folder of {name!r}")
    return path


# --- values in -----------------------------------------------------------------------------------


def build(cls: type[S], values: Mapping[str, Any], base: Section | None = None) -> S:
    """`values` (nested mappings, as YAML gives them) as a `cls`, over `base`'s or the defaults.

    Raises `ConfigError` for an unknown field, a wrong type or a value out of range.
    """
    return _validated(cls, _merged({} if base is None else to_dict(base), values), {})


def changed(config: S, **values: Any) -> S:
    """`config` with other values of some fields; nested mappings reach into sections."""
    return build(type(config), values, config)


def load(
    cls: type[S] | Callable[[Mapping[str, Any]], type[S]],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    base: Section | None = None,
) -> S:
    """A configuration from an optional YAML file and `key.sub=value` overrides, in that order, over
    `base`.

    Args:
        cls: its class, or what tells the class from all the values.
        path, overrides, base: what is read.

    Raises:
        ConfigError: a file or a value that cannot be used.
    """
    values: Mapping[str, Any] = {} if base is None else to_dict(base)
    if path is not None:
        values = _merged(values, _mapping(read_yaml(Path(path), "--config"), "configuration"))
    typed: dict[Location, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r}: expected key=value, for instance seed=1")
        keys = tuple(key.strip().split("."))
        typed[keys] = value
        values = _merged(values, _nested(keys, _parsed(value)))
    made: Any = cls if isinstance(cls, type) else cls(values)
    return _validated(made, values, typed)


def _validated(cls: type[S], values: Mapping[str, Any], typed: Mapping[Location, str]) -> S:
    """As JSON, of which strict validation still takes a list for a tuple. What was `typed` on the
    command line is text if its field is, and a list between commas.
    """
    try:
        return cls.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        # of the members of a union, the one that was meant is the one that got furthest
        rank = lambda fault: (len(fault["loc"]), fault["type"] == "value_error")  # noqa: E731
        fault: Any = max(error.errors(), key=rank)
    keys = tuple(fault["loc"])
    if keys in typed and fault["type"] in ("string_type", "tuple_type"):
        rest = dict(typed)
        meant: Any = rest.pop(keys)
        if fault["type"] == "tuple_type":
            meant = [_parsed(part) for part in meant.split(",") if part.strip()]
        return _validated(cls, _merged(values, _nested(keys, meant)), rest)
    raise ConfigError(_worded(cls, fault))


def _parsed(text: str) -> Any:
    if text.strip().lower() == "none":
        return None
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def _nested(keys: Sequence[Any], value: Any) -> Any:
    return functools.reduce(lambda inner, key: {key: inner}, reversed(keys), value)


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`new` over `old`, sections one by one."""
    result = dict(old)
    for key, value in new.items():
        value = to_dict(value) if isinstance(value, Section) else value
        before = result.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = _merged(before, value)
        result[key] = value
    return result


def _mapping(values: Any, where: str) -> Mapping[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: got {values!r}, expected a mapping of fields to values")
    return values


def _worded(cls: type[Section], fault: Any) -> str:
    """A fault of pydantic's in the words of this package."""
    where, owner, left = _found(cls, fault["loc"])
    names = _names(owner)
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        name = str(left[0])
        known = (line.strip().partition(" ")[0].rstrip(":") for line in describe(cls))
        elsewhere = ", ".join([path for path in known if path.endswith(f".{name}")][:4])
        close = difflib.get_close_matches(name, names, n=1)
        nearest = f"nearest is {close[0]!r}; " if close else ""
        hint = f"there is {elsewhere}; " if elsewhere else nearest
        here = f"fields here: {', '.join(names) or 'none'}"
        return f"{_dotted((*where, *left))}: no such field; {hint}{here}"
    if fault["type"] == "value_error":  # raised by our own code, which may name the field
        name, colon, text = str(fault["ctx"]["error"]).partition(": ")
        if colon and where[-1:] == (name,):
            return f"{_dotted(where)}: {text}"
        if colon and name in names:
            return f"{_dotted((*where, name))}: {text}"
        return f"{_dotted(where) or 'configuration'}: {fault['ctx']['error']}"
    if fault["type"] == "model_type":
        expected = f"a mapping of {', '.join(names)}"
    else:
        expected = fault["msg"].removeprefix("Input should be ").replace("valid array", "list")
    return f"{_dotted(where)}: got {fault['input']!r}, expected {expected}"


def _dotted(location: Sequence[Any]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).removeprefix(".")


def _found(cls: Any, location: Location) -> tuple[Location, Any, Location]:
    """A path as far as its names are fields, the class whose field the last of them is or holds,
    and the rest: a name that is no field. Which member of a union was meant is no part of it.
    """
    where: list[int | str] = []
    hint: Any = cls
    for place, part in enumerate(location):
        members = {getattr(m, "__name__", ""): m for m in typing.get_args(hint)}
        if (member := members.get(part)) is not None:
            cls = member if _names(member) else cls
        elif isinstance(part, str) and part not in _names(cls):
            return tuple(where), cls, location[place:]
        else:
            where.append(part)
            if isinstance(part, str):
                hint = cls.model_fields[part].annotation if hasattr(cls, "model_fields") else None
                cls = section_in(hint) or cls
    return tuple(where), cls, ()


def _names(cls: Any) -> list[str]:
    """Of the fields of a section, or of a dataclass that a function takes."""
    return list(getattr(cls, "model_fields", None) or getattr(cls, "__dataclass_fields__", ()))


def section_in(hint: Any) -> type[Section] | None:
    """The section that a field is, or holds a tuple of."""
    if isinstance(hint, type) and issubclass(hint, Section):
        return hint
    found = map(section_in, typing.get_args(hint))
    return next((cls for cls in found if cls is not None), None)


# --- YAML ----------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML in which a key that comes twice is an error, not the last one of them, and 2e-3 (no
    dot), which YAML 1.1 reads as text, the number that people mean.
    """

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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path, name: str) -> Any:
    """What a YAML file holds; `ConfigError` under the `name` of an option if it cannot be read."""
    if not path.is_file():
        raise ConfigError(f"{name} {path}: no such file")
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} {path}: not valid YAML: {error}") from error


# --- sections of functions -----------------------------------------------------------------------


def arguments_of(
    function: Callable[..., Any], name: str, rest: Any = None, given: Sequence[str] = ()
) -> type[Section]:
    """The section of a function's arguments: a field for each, with its type, its default and what
    the docstring says of it. Values are checked by calling the function with them.

    Args:
        function: what is called with the section's `arguments`.
        name: of the class.
        rest: takes what the function does as ``**rest``; another function, or a dataclass.
        given: parameters that are no fields; then the function is not called.
    """
    fields = _fields_of(function, given)
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        fields |= _fields_of(rest)

    def try_it(self: Any) -> Any:
        try:
            if not given:
                function(**arguments(self))
        except (TypeError, ValueError) as error:
            if str(error).partition(":")[0] in fields:
                raise ValueError(str(error)) from error  # of a value: told at its field
            name = getattr(function, "__name__", "objective")
            raise ValueError(f"{name}(): {error}") from error
        return self

    check: Any = model_validator(mode="after")(try_it)
    return create_model(name, __base__=Section, __validators__={"try_it": check}, **fields)


def _fields_of(function: Any, given: Sequence[str] = ()) -> dict[str, Any]:
    """name -> (type, default and description) of each argument that has a default to be told."""
    inner = function.func if isinstance(function, functools.partial) else function
    hints, notes = typing.get_type_hints(inner), _documented(inner)
    return {
        key: (hints.get(key, Any), setting(... if p.default is p.empty else p.default, told))
        for key, p in inspect.signature(function).parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and key not in given
        for told in [notes.get(key, "")]
    }


def arguments(section: Section) -> dict[str, Any]:
    """The fields of an `arguments_of` as keyword arguments."""
    return {key: getattr(section, key) for key in type(section).model_fields}


def _documented(function: Callable[..., Any]) -> dict[str, str]:
    """name -> text of a docstring's ``Args:`` or ``Attributes:``; ``a, b: text`` is of both."""
    text = re.split(r"^(?:Args|Attributes):\n", inspect.getdoc(function) or "", flags=re.MULTILINE)
    entries = re.findall(
        r"^    (\S[^:]*): (.*(?:\n     +.*)*)", text[-1].split("\n\n")[0], re.MULTILINE
    )
    return {
        name.strip(): " ".join(text.split()) for names, text in entries for name in names.split(",")
    }


# --- values out ----------------------------------------------------------------------------------


def to_dict(config: Section) -> dict[str, Any]:
    """The configuration as plain YAML-able values, the inverse of `build`."""
    return config.model_dump(mode="json")


def dump(config: Section) -> str:
    """The configuration as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(old: Any, new: Any, where: Location = ()) -> list[str]:
    """One line `field: old -> new` for every field in which two configurations, or two mappings of
    mappings, differ."""
    old, new = (to_dict(value) if isinstance(value, Section) else value for value in (old, new))
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old == new else [f"{_dotted(where)}: {old!r} -> {new!r}"]
    lines = (differences(old.get(k), new.get(k), (*where, k)) for k in dict.fromkeys((*old, *new)))
    return [line for some in lines for line in some]


def describe(cls: type[Section], where: str = "") -> Iterator[str]:
    """One entry a field for `--help`: dotted name, type, default, meaning."""
    for name, field in cls.model_fields.items():
        path, inner = f"{where}{name}", section_in(field.annotation)
        if inner is not None and field.annotation is inner:
            yield f"{path}: {field.description}"
            yield from describe(field.get_default(call_default_factory=True).__class__, f"{path}.")
            continue
        default = field.get_default(call_default_factory=True)
        shown = list(default) if isinstance(default, tuple) else default
        yield f"  {path:<28} {_type(field.annotation, field.metadata)}; default {shown!r}"
        yield f"{'':<8}{field.description}"
        if inner is not None:
            yield from describe(inner, f"{path}[i].")


def _type(hint: Any, constraints: Sequence[Any]) -> str:
    """A type as a reader would name it, with its range."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(hint) is tuple:
        return f"list of {_type(arguments[0], ())}"
    if arguments:
        names = [_type(kind, constraints) for kind in arguments if kind is not type(None)]
        return " or ".join(names + ["null"] * (type(None) in arguments))
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    limits = [f" {sign} {getattr(c, k)}" for c in constraints for k, sign in signs if hasattr(c, k)]
    return hint.__name__ + "".join(limits)
