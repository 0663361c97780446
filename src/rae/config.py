"""Typed configuration: every section is a `Config`, an unknown key is an error that names the nearest known one.

A component's own configuration stands beside its code (`DiTConfig` in `diffusion/dit.py`); a recipe composes them.
This file holds what they share: the strict base class, YAML with dotted overrides, and readable errors.
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic
import yaml


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key, the value and the remedy."""


class Config(pydantic.BaseModel):
    """Base of every configuration in the project: immutable, and strict about its keys."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True)


C = TypeVar("C", bound=Config)


def load_recipe(schema: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read a YAML recipe and apply dotted overrides, later ones winning.

    Args:
        schema: the configuration class that the file must fit.
        path: a YAML file.
        overrides: strings `section.key=value`; the value is read as YAML (`lr=2e-4`, `grid=[16,16]`, `stats=null`).

    Raises:
        ConfigError: no such file, not YAML, an override without `=`, an unknown key, or a value that does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such recipe. Recipes of this project are in recipes/.")
    try:
        data = yaml.load(path.read_text(), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, this file holds {type(data).__name__}.")
    for override in overrides:
        _set(data, override)
    return parse(schema, data, str(path))


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
        problems = "\n".join(f"  {_explain(schema, problem)}" for problem in error.errors())
        raise ConfigError(f"{where} does not fit:\n{problems}") from error


def read_json(schema: type[C], path: str | Path) -> C:
    """Read a `config.json` of a saved model; errors as in `parse`."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} is missing: {path.parent} is not a folder that rae saved.")
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); the file is damaged or was cut short.") from error
    return parse(schema, data, str(path))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-4` as a string; recipes mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def _set(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value.")
    *parents, last = key.split(".")
    for depth, name in enumerate(parents):
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section.")
    data[last] = yaml.load(text, Loader=_Loader)


def _explain(schema: type[Config], problem: Any) -> str:
    *parents, last = problem["loc"] or ("",)
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = sorted({name for section in _sections(schema, parents) for name in section.model_fields})
        nearest = difflib.get_close_matches(str(last), known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
        return f"{key}: unknown key{hint} Known here: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"{key}: required and not given."
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key or 'recipe'}: {message} (got {problem['input']!r})." if key else message


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
