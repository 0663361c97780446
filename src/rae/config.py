"""Typed configuration: every section is a `Config`, an unknown key is an error that names the nearest known one.

A component's own configuration stands beside its code (`DiTConfig` in `diffusion/dit.py`); a recipe composes them.
This file holds what they share: the strict base class, YAML with dotted overrides, and readable errors.
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import pydantic
import yaml


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key, the value and the remedy."""


class Config(pydantic.BaseModel):
    """Base of every configuration in the project: immutable, and strict about its keys."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True)


C = TypeVar("C", bound=Config)


def _both_sides(size: Any) -> Any:
    return (size, size) if isinstance(size, int) else size


# (H, W) in pixels; one number is both.
Size = Annotated[tuple[pydantic.PositiveInt, pydantic.PositiveInt], pydantic.BeforeValidator(_both_sides)]


def load_recipe(schema: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read a YAML recipe and apply dotted overrides, later ones winning.

    Args:
        schema: the configuration class that the file must fit.
        path: a YAML file.
        overrides: strings `section.key=value`; the value is read as YAML (`lr=2e-4`, `grid=[16,16]`, `stats=null`).

    Raises:
        ConfigError: no such file, not YAML, a key given twice, an override without `=`, an unknown key, or a value
            that does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such recipe. Recipes of this project are in recipes/.")
    data = _read_yaml(path.read_bytes(), str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, this file holds {type(data).__name__}.")
    for override in overrides:
        _set(data, override)
    return parse(schema, data, f"{path} with {' '.join(overrides)}" if overrides else str(path))


def parse(schema: type[C], data: dict[str, Any], where: str) -> C:
    """Validate `data` against `schema`.

    Args:
        schema: the configuration class.
        data: nested mappings, as from YAML or JSON.
        where: what to call the source in an error (a file name).

    Raises:
        ConfigError: with one line per problem.
    """
    try:
        return schema.model_validate(data)
    except pydantic.ValidationError as error:
        problems = {}
        for problem in error.errors():
            problems.setdefault(tuple(_keys(data, problem)), []).append(problem)
        lines = "\n".join(f"  {_explain(schema, keys, found)}" for keys, found in problems.items())
        raise ConfigError(f"{where} does not fit:\n{lines}") from error


def read_json(schema: type[C], path: str | Path) -> C:
    """Read a `config.json` of a saved model; errors as in `parse`."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} is missing: {path.parent} holds no saved model.")
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not text at all
        raise ConfigError(f"{path} is not valid JSON ({error}); the file is damaged or was cut short.") from error
    return parse(schema, data, str(path))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-4` as a string, recipes mean a number; PyYAML takes the last of two equal keys in silence."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {name!r} is given twice, in lines {lines[name]} and {line}; keep one of them"
                )
            lines[name] = line
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def _read_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date and is none
        raise ConfigError(f"{where}: not valid YAML: {error}") from error


def _set(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value (without spaces around =).")
    *parents, last = key.split(".")
    for depth, name in enumerate(parents):
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section.")
    # in YAML nothing is null; in a shell, whose quotes are gone by now, it is the empty text
    data[last] = _read_yaml(text, f"override {override!r}") if text else ""


def _keys(data: Any, problem: Any) -> Iterator[str | int]:
    """The keys in `data` that lead to a problem: pydantic also names the members of unions that it has tried."""
    for depth, part in enumerate(problem["loc"], start=1):
        missing = problem["type"] == "missing" and depth == len(problem["loc"])
        inside = part in data if isinstance(data, dict) else isinstance(data, list | tuple) and isinstance(part, int)
        if inside or missing:
            yield part
            data = None if missing else data[part]


def _explain(schema: type[Config], keys: Sequence[str | int], problems: Sequence[Any]) -> str:
    """One line on what is wrong at `keys`; several problems are those of the members of a union."""
    *parents, last = keys or ("",)
    key, problem = ".".join(map(str, keys)), problems[0]
    if problem["type"] == "extra_forbidden":
        known = sorted({name for section in _sections(schema, parents) for name in section.model_fields})
        nearest = difflib.get_close_matches(str(last), known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
        return f"{key}: unknown key{hint} Known here: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"{key}: required and not given."
    first, *others = (p["msg"].removeprefix("Value error, ") for p in problems)
    message = " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
    return f"{key}: {message} (got {problem['input']!r})." if key else message


def _sections(schema: type[Config], parents: Sequence[Any]) -> list[type[Config]]:
    """Configuration classes that a dotted path of keys can lead to (several where a field is a union)."""
    found = [schema]
    for name in parents:
        fields = [s.model_fields[name].annotation for s in found if isinstance(name, str) and name in s.model_fields]
        found = [c for annotation in fields for c in _configs_in(annotation)] or found
    return found


def _configs_in(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for part in get_args(annotation):
        yield from _configs_in(part)
