"""Experiment configuration: typed schema <- YAML file <- dotted overrides.

A schema is a dataclass; every leaf is declared with :func:`key`, which holds its default, its help text and
its range, once. Loading reports every problem at once, names the nearest valid key for an unknown one, and
refuses interpolation (``${...}``), so text from a user can never read the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mobula.errors import ConfigError

T = TypeVar("T")


def key(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[str] | None = None,
    renamed: Mapping[str, str] | None = None,
) -> Any:
    """Declare a leaf of a schema: default, help text and, where it has one, its range or its choices.

    A mutable default (list, dict) is copied for every instance. ``renamed``: old names of choices, whose use is an
    error that says the new one. Keys that were renamed stand in the schema: ``RENAMED: ClassVar = {"old": "new"}``.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {
        "help": help,
        "bounds": {k: v for k, v in bounds.items() if v is not None},
        "choices": choices,
        "renamed": renamed or {},
    }
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(schema: type[T]) -> T:
    """Declare a nested section of a schema."""
    return dataclasses.field(default_factory=schema)


def load(schema: type[T], path: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Build an instance of ``schema`` from its defaults, a YAML file and ``a.b=value`` overrides, in that order.

    Raises:
        ConfigError: with every unknown key, wrong type, value out of range and contradiction found.
    """
    values = read_yaml(path) if path else {}
    source = str(path) if path else "config"
    return build(schema, values, overrides, source)


def build(schema: type[T], values: dict[str, Any], overrides: Sequence[str] = (), source: str = "config") -> T:
    """As :func:`load`, from a nested mapping instead of a file."""
    result = unchecked(schema, values, overrides, source)
    problems = contradictions(result)
    if problems:
        raise ConfigError(problems, source)
    return result


def unchecked(schema: type[T], values: dict[str, Any], overrides: Sequence[str] = (), source: str = "config") -> T:
    """As :func:`build`, without a look at contradictions between keys."""
    problems: list[str] = []
    assignments = list(_leaves(values, schema))
    for text in overrides:
        parsed = _parse_override(text)
        if isinstance(parsed, str):
            problems.append(parsed)
        else:
            assignments.append(parsed)
    config = OmegaConf.structured(schema)
    fields, renamed = dict(_fields(schema)), dict(_renamed(schema))
    for name, value in assignments:
        problems.extend(_assign(config, fields, renamed, name, value))
    if problems:
        raise ConfigError(problems, source)
    return OmegaConf.to_object(config)  # type: ignore[return-value]


def check_values(schema: type, values: Iterable[tuple[str, Any]]) -> list[str]:
    """What is wrong with (dotted key, value) pairs taken one by one: unknown keys, wrong types, values out of range.

    Contradictions between keys are not looked at; :func:`build` finds them.
    """
    fields, renamed = dict(_fields(schema)), dict(_renamed(schema))
    return [p for name, value in values for p in _assign(OmegaConf.structured(schema), fields, renamed, name, value)]


def contradictions(config: Any) -> list[str]:
    """What the ``problems()`` of a config and of its sections say; a section checks what concerns several keys."""
    return list(_contradictions(config, ""))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping safely.

    Raises:
        ConfigError: if the file is missing, is not YAML, names a key twice or is not a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot read the file ({error.__class__.__name__})"], str(path)) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"not valid YAML: {' '.join(str(error).split())}"], str(path)) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError([f"expected a mapping of keys, found {type(values).__name__}"], str(path))
    return values


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class."""
        seen: set[str] = set()
        for name in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if name.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name.value} stands twice", name.start_mark
                )
            seen.add(name.value)
        return super().construct_mapping(node, deep)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain nested dictionaries."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The config as YAML, every key present."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-serialisable value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def describe(schema: type) -> list[tuple[str, str, str]]:
    """Rows (dotted key, default, help) for every leaf of a schema."""
    return [(name, repr(_default(field)), field.metadata.get("help", "")) for name, field in _fields(schema)]


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys at which two nested dictionaries differ, as ``key: old -> new``."""
    rows: list[str] = []
    for name in sorted(a.keys() | b.keys()):
        dotted = f"{prefix}{name}"
        left, right = a.get(name, "(absent)"), b.get(name, "(absent)")
        if isinstance(left, dict) and isinstance(right, dict):
            rows.extend(differences(left, right, f"{dotted}."))
        elif left != right:
            rows.append(f"{dotted}: {left} -> {right}")
    return rows


def nearest(name: str, valid: Sequence[str]) -> str:
    """``" (did you mean X?)"`` for the valid name closest to ``name``, or the list of valid names."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if not close:
        tail = [v for v in valid if v.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
        close = tail[:1]
    if close:
        return f" (did you mean {close[0]}?)"
    return f" (valid: {', '.join(sorted(valid))})" if len(valid) <= 12 else ""


def _fields(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    hints = _hints(schema)
    for field in dataclasses.fields(schema):
        dotted = f"{prefix}{field.name}"
        nested = hints[field.name]
        if dataclasses.is_dataclass(nested):
            yield from _fields(nested, f"{dotted}.")  # type: ignore[arg-type]
        else:
            yield dotted, field


def _renamed(schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted (old, new) keys and sections that a schema and its sections say were renamed."""
    for old, new in getattr(schema, "RENAMED", {}).items():
        yield f"{prefix}{old}", f"{prefix}{new}"
    hints = _hints(schema)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _renamed(hints[field.name], f"{prefix}{field.name}.")


def _hints(schema: type) -> dict[str, Any]:
    from typing import get_type_hints

    return get_type_hints(schema)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _leaves(values: dict[str, Any], schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted (key, value) pairs; a mapping is opened only where the schema has a section of that name."""
    hints = _hints(schema)
    for name, value in values.items():
        nested = hints.get(str(name))
        dotted = f"{prefix}{name}"
        if isinstance(value, dict) and dataclasses.is_dataclass(nested):
            yield from _leaves(value, nested, f"{dotted}.")  # type: ignore[arg-type]
        else:
            yield dotted, value


def _parse_override(text: str) -> tuple[str, Any] | str:
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        return f"override {text!r} is not of the form key=value"
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        return f"override {text!r}: the value is not valid YAML"


def _assign(
    config: Any, fields: dict[str, dataclasses.Field], renamed: dict[str, str], name: str, value: Any
) -> list[str]:
    field = fields.get(name)
    if field is None:
        for old, new in renamed.items():
            if name == old or name.startswith(f"{old}."):
                return [f"{name} was renamed: use {new}{name.removeprefix(old)}"]
        if any(dotted.startswith(f"{name}.") for dotted in fields):
            return [f"{name} is a section and needs a mapping, found {value!r}"]
        sections = {dotted[:i] for dotted in fields for i, c in enumerate(dotted) if c == "."}
        return [f"unknown key {name}{nearest(name, [*fields, *sorted(sections)])}"]
    written = json.dumps(value, default=str)
    if "${" in written:
        return [f"{name}: interpolation (${{...}}) is not allowed"]
    if '"???"' in written:
        # OmegaConf's mark of a value that is still to come.
        return [f"{name}: ??? is not a value"]
    if isinstance(value, bool) and "float" in str(field.type):
        return [f"{name}={value!r}: expected a number"]
    if isinstance(value, str) and "float" in str(field.type):
        # YAML 1.1 reads 1e-3 as text; a person means a number.
        value = _number(value)
    try:
        OmegaConf.update(config, name, value, merge=False)
    except OmegaConfBaseException as error:
        return [f"{name}={value!r}: expected {field.type} ({str(error).splitlines()[0]})"]
    # What the schema made of it: a number may have been written as text.
    kept = OmegaConf.select(config, name)
    return _out_of_range(name, list(kept) if OmegaConf.is_list(kept) else kept, field)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _out_of_range(name: str, value: Any, field: dataclasses.Field) -> list[str]:
    choices = field.metadata.get("choices")
    items = value if isinstance(value, list) else [value]
    if choices is not None:
        wrong = [v for v in items if v is not None and v not in choices]
        was = field.metadata["renamed"]
        return [
            f"{name}={v!r} was renamed: use {was[v]}"
            if v in was
            else f"{name}={v!r}: expected one of {', '.join(map(str, choices))}{_hint(v, choices)}"
            for v in wrong
        ]
    tests = {
        "ge": lambda v, b: v >= b,
        "gt": lambda v, b: v > b,
        "le": lambda v, b: v <= b,
        "lt": lambda v, b: v < b,
    }
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    problems = []
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int | float):
            continue
        if not math.isfinite(item):
            problems.append(f"{name}={item!r}: must be a finite number")
            continue
        for kind, bound in field.metadata.get("bounds", {}).items():
            if not tests[kind](item, bound):
                problems.append(f"{name}={item!r}: must be {words[kind]} {bound}")
    return problems


def _hint(value: Any, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _contradictions(config: Any, prefix: str) -> Iterator[str]:
    check = getattr(config, "problems", None)
    if callable(check):
        yield from (f"{prefix}{problem}" for problem in check())
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _contradictions(value, f"{prefix}{field.name}.")
