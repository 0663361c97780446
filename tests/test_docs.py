"""The documentation tells the truth: its commands parse, its Python runs, its list of keys is that of the schemas."""

import inspect
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from PIL import Image

from rae.cli import rae
from rae.config import Config, _configs_in
from rae.data.image_set import read_image
from rae.training.decoder import DecoderRecipe
from rae.training.dit_recipe import DiTRecipe
from rae.training.run_folder import FREE

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BEGIN, END = "<!-- keys: written by `make help` -->\n", "<!-- end of keys -->\n"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> list:
    """Every `rae ...` line of the pages and of the recipes' headers, `torchrun ... -m rae.cli -- ...` among them."""
    lines = []
    for page in PAGES:
        for block in blocks(page.read_text(), "bash"):
            lines += block.replace("\\\n", " ").splitlines()
    for recipe in ROOT.glob("recipes/**/*.yaml"):
        lines += [line.removeprefix("#").strip() for line in recipe.read_text().splitlines() if line.startswith("#   ")]
    lines = [re.sub(r"^torchrun .* -m rae\.cli -- ", "rae ", line) for line in lines]
    return [pytest.param(line, id=line[:60]) for line in lines if line.startswith("rae ")]


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line):
    _, name, *arguments = shlex.split(line, comments=True)
    parsed = rae.commands[name].make_context(name, arguments, parent=rae.make_context("rae", [name])).params
    assert "recipe" not in parsed or (ROOT / parsed["recipe"]).is_file()


def test_python_of_the_readme_runs(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (90 * i, 50, 20)).save(tmp_path / f"samples/{i:06d}.png")
    (code,) = blocks((ROOT / "README.md").read_text(), "python")
    for stage, name in (("decoder", "photos-decoder"), ("dit", "photos-ditdh")):
        assert f'"runs/{name}"' in code
        code = code.replace(f'"runs/{name}"', repr(str(runs / stage)))
    exec(code, {})
    assert [read_image(name).shape for name in ("decoded.png", "new-0.png")] == [(16, 32, 3)] * 2


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


# --- keys of the recipes


def keys(schema: type[Config], values: Config | None = None) -> Iterator[str]:
    """The lines of the schema's own source, as annotated YAML: sections nested, defaults and comments kept."""
    classes = [part for part in reversed(schema.__mro__) if issubclass(part, Config) and part is not Config]
    lines = [line for part in classes for line in inspect.getsource(part).splitlines()]
    declared = {}  # the last class that declares a field says what it is, in the place where the first one does
    for line, following in zip(lines, [*lines[1:], ""]):
        field = re.fullmatch(r"    (\w+): (.+?)(?:  # (.*))?", line)
        if field and field[1] in schema.model_fields:
            declared[field[1]] = field, following
    for field, following in declared.values():
        info = schema.model_fields[field[1]]
        if sections := list(_configs_in(info.annotation)):
            yield f"{field[1]}:"
            given = getattr(values or info, field[1] if values else "default", None)
            given = given if isinstance(given, Config) else None
            yield from (f"  {nested}" for section in sections for nested in keys(section, given))
            continue
        below = re.fullmatch(r"    # (.*)", following)
        choices = re.match(r"Literal\[(\".*?)\]", field[2])
        kind = choices[1].replace(", ", " | ") if choices else None
        comment = "; ".join(filter(None, [kind, field[3] or (below and below[1])]))
        if values:  # what the section that this one is in gives it
            default = _yaml(getattr(values, field[1]))
        else:
            default = "REQUIRED" if info.is_required() else _yaml(info.default)
        yield f"{field[1]}: {default}".ljust(28) + f"  # {comment or field[2].split(' = ')[0]}"


def _yaml(value) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def keys_text() -> str:
    parts = [("rae train-decoder", DecoderRecipe), ("rae train-dit", DiTRecipe)]
    return "\n".join(f"`{command}`:\n\n```yaml\n" + "\n".join(keys(s)) + "\n```\n" for command, s in parts)


def test_keys_are_those_of_the_schemas():
    page = (ROOT / "docs/recipes.md").read_text()
    assert page.split(BEGIN)[1].split(END)[0] == keys_text(), "run: make help"


def test_keys_that_may_change_are_those_that_the_page_names():
    (paragraph,) = re.findall(r"^\*\*Resuming\*\*.*?\n\n", (ROOT / "docs/recipes.md").read_text(), re.M | re.S)
    named = re.findall(r"`([\w.*]+)`", paragraph)
    known = {key for schema in (DecoderRecipe, DiTRecipe) for key in dotted(schema)}
    assert {key for key in known if any(fnmatch(key, pattern) for pattern in named)} == FREE


def dotted(schema: type[Config], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        sections = list(_configs_in(field.annotation))
        yield from (key for section in sections for key in dotted(section, f"{prefix}{name}."))
        if not sections:
            yield prefix + name


if __name__ == "__main__":
    path = ROOT / "docs/recipes.md"
    before, rest = path.read_text().split(BEGIN)
    path.write_text(before + BEGIN + keys_text() + END + rest.split(END)[1])
