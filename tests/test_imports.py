"""The house's rules that no type checker sees: which way imports point, what importing costs, what is never done."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rae

SOURCE = Path(rae.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


def part_of(file: Path) -> str:
    return file.relative_to(SOURCE).with_suffix("").parts[0]


# config, processes <- sources <- folders <- autoencoder, diffusion, data (which do not import each other) <- evaluation
# <- training <- interop <- commands <- demo, experiments <- cli. A part may import itself and what stands here.
BASE = {"config", "processes"}
PICKLES = {"interop/official.py", "evaluation/pretrained.py"}  # of files that the user names, or whose hash is known
WEIGHTS = BASE | {"sources", "folders"}
MODELS = WEIGHTS | {"autoencoder", "diffusion", "data"}
LIBRARY = MODELS | {"evaluation", "training", "interop"}
MAY_IMPORT = {
    "config": set(),
    "processes": set(),
    "sources": BASE,
    "folders": BASE | {"sources"},
    "autoencoder": WEIGHTS,
    "diffusion": WEIGHTS,
    "data": BASE | {"sources"},
    "evaluation": MODELS,
    "training": MODELS | {"evaluation"},
    "interop": MODELS | {"evaluation", "training"},
    "commands": LIBRARY,
    "demo": LIBRARY | {"commands"},
    "experiments": LIBRARY | {"commands"},
    "cli": LIBRARY | {"commands", "demo", "experiments"},
}


def parts_imported(tree: ast.AST) -> set[str]:
    """Parts of the package that a file imports, at its top or inside functions."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that they can be searched for"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in modules if name.startswith("rae.")}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_point_one_way(file):
    part = part_of(file)
    if part == "__init__":
        return
    wrong = parts_imported(ast.parse(file.read_text())) - MAY_IMPORT[part] - {part, "__version__"}
    assert not wrong, f"rae.{part} must not import {', '.join(sorted(wrong))}"


def test_the_check_sees_what_it_looks_for():
    code = (
        "import rae.demo\nfrom rae.data.images import x\nfrom rae import config\ndef f():\n    from rae.cli import main"
    )
    assert parts_imported(ast.parse(code)) == {"demo", "data", "config", "cli"}


@pytest.mark.parametrize("module", ["rae", "rae.config", "rae.cli"])
def test_importing_loads_nothing_heavy(module):
    heavy = ["torch", "transformers", "accelerate", "matplotlib", "sklearn", "skimage", "scipy", "onnx"]
    code = f"import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == []


def test_public_names_exist_and_are_listed():
    for name in rae.__all__:
        assert getattr(rae, name).__name__ == name
        assert name in dir(rae)
    with pytest.raises(AttributeError, match="no attribute 'DiTT'"):
        rae.DiTT  # noqa: B018


def keywords(tree: ast.AST):
    """(function, keyword, constant) of every call that passes a constant by keyword."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield name, None, None, node
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant):
                    yield name, keyword.arg, keyword.value.value, node


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_weights_are_loaded_strictly_and_never_from_pickles(file):
    for name, keyword, value, node in keywords(ast.parse(file.read_text())):
        where = f"{file.relative_to(SOURCE)}:{node.lineno}"
        # zip(strict=False) says something else
        assert (keyword, value) != ("strict", False) or name == "zip", f"{where}: weights must fit exactly"
        assert (keyword, value) != ("weights_only", False), f"{where}: unpickles whatever the file says"
        if keyword is None and name == "load" and ast.unparse(node.func) == "torch.load":
            assert str(file.relative_to(SOURCE)) in PICKLES, f"{where}: only these read pickles"
            assert {k.arg: getattr(k.value, "value", None) for k in node.keywords}.get("weights_only") is True, where
        assert not ast.unparse(node.func).startswith("pickle."), where
