"""Pooled latents of images in classes: made in fixed chunks by any number of processes, kept, read in order.

images --encode--> latents [C,h,w] --pool--> FOLDER/NAME/000000.safetensors, 000001.safetensors, ... --> Probed

The order is that of the images' digests, which knows nothing of the order that they came in.
"""

import hashlib
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rae.autoencoder.baselines import is_baseline, open_autoencoder
from rae.autoencoder.encoders import load_encoder
from rae.autoencoder.latents import tokens_to_map
from rae.commands.feature_folder import check_left_out, check_unchanged
from rae.commands.pictures import OutputError, claim
from rae.config import ConfigError
from rae.data.crops import center_crop
from rae.data.image_set import Images
from rae.data.images import DataConfig, Views, read, readable_chunks, to_tensor, to_unit
from rae.evaluation.reference import pixels_sha256
from rae.folders import aside, saved_kind
from rae.processes import process_state
from rae.training.display import progress

Pool = Literal["mean", "none"]

CHUNK = 512  # images in a file, which an interruption costs at most
POOLS: dict[Pool, Callable[[Tensor], Tensor]] = {
    "mean": lambda z: z.mean((2, 3)),  # latents [B,C,h,w] -> [B,C]
    "none": lambda z: z.flatten(1),  # -> [B, C h w]
}


# --- latent spaces ---------------------------------------------------------------------------------------------------


class Latents(NamedTuple):
    """A latent space.

    Attributes:
        name: as it was asked for.
        module: holds the weights.
        encode: [0,1] images [B,3,*image_size] -> latents [B,*shape].
        image_size: (H, W).
        shape: (C, h, w).
        identity: SHA-256 (hex) of all that decides what latents mean.
    """

    name: str
    module: nn.Module
    encode: Callable[[Tensor], Tensor]
    image_size: tuple[int, int]
    shape: tuple[int, int, int]
    identity: str


def open_latents(
    names: Sequence[str], image_size: tuple[int, int] | None, input_size: tuple[int, int] | None
) -> list[Latents]:
    """Open latent spaces by name.

    Args:
        names: of encoders, as `load_encoder` takes them; of local autoencoders, pixels@SIZE or sd-vae:WEIGHTS@SIZE, as
            `open_autoencoder` takes them.
        image_size, input_size: of the encoders; the others have their own.

    Raises:
        ConfigError: a size that is missing, or given although no encoder is there to take it; a name given twice.
        Besides, what opening them raises.
    """
    if len(set(names)) < len(names):
        raise ConfigError(f"{', '.join(names)}: one of them is named twice; name each once.")
    encoders = [name for name in names if not is_baseline(name) and not saved_kind(name)]
    if encoders and image_size is None:
        raise ConfigError(f"the encoder {encoders[0]} takes images of many sizes; say which with --image-size.")
    if not encoders and (image_size or input_size):
        raise ConfigError(f"{', '.join(names)} have their sizes; leave --image-size and --input-size out.")
    return [_open(name, name in encoders, image_size, input_size) for name in names]


def _open(name: str, is_encoder: bool, image_size: Any, input_size: Any) -> Latents:
    if not is_encoder:
        rae = open_autoencoder(name)
        return Latents(name, rae, rae.encode, rae.image_size, rae.latent_shape, rae.latent_identity)
    encoder = load_encoder(name, image_size=image_size, input_size=input_size)

    def encode(images: Tensor) -> Tensor:
        return tokens_to_map(encoder(images), encoder.grid)

    return Latents(name, encoder, encode, image_size, (encoder.width, *encoder.grid), encoder.identity())


# --- features --------------------------------------------------------------------------------------------------------


class Probed(NamedTuple):
    """Features of images, in the order of the images' digests.

    Attributes:
        features: [N,d] float32.
        labels: [N], as `Images` has them.
        digests: [N] int64, of the images' pixels as they were read, before any crop.
        names: of the images.
    """

    features: Tensor
    labels: Tensor
    digests: Tensor
    names: list[str]

    def take(self, chosen: Tensor) -> "Probed":
        """Those of a mask [N]."""
        names = [self.names[i] for i in chosen.nonzero().flatten().tolist()]
        return Probed(self.features[chosen], self.labels[chosen], self.digests[chosen], names)


@torch.no_grad()
def write_features(
    space: Latents, pools: Sequence[Pool], images: Images, data: DataConfig, folder: Path, *, batch: int
) -> None:
    """Pooled latents of all images, centre-cropped: what is not there yet, every process its share of the chunks.

    Args:
        space: what encodes.
        pools: what is kept of latents, each in a folder of its own.
        images, data: which images, and how they are read.
        folder: made if it does not exist.
        batch: images at a time.

    Raises:
        ImageError: an image that cannot be read, unless `data.on_broken` is "skip", or is too small.
        OutputError: images were changed since, as of `check_unchanged`.
        FloatingPointError: latents that are not finite.
    """
    state = process_state()
    places = {pool: _place(folder, space, pool, images, data) for pool in pools}
    if state.is_main_process:
        for pool in pools:
            claim(places[pool], "features.json", _about(space, pool, images, data))
    state.wait_for_everyone()
    todo, there, views = [], [], _Digested(images, data, space.image_size)
    for k, chunk in list(enumerate(_chunks(images)))[state.process_index :: state.num_processes]:
        files = [_file(place, k) for place in places.values()]
        if all(file.exists() for file in files):
            there += files
        else:
            todo.append((k, chunk))
    check_unchanged(there, views, "digest", operator.itemgetter("digest"))
    space.module.to(state.device)
    with progress(f"encoding, {space.name}", sum(len(chunk) for _, chunk in todo)) as advance:
        done = 0
        for (k, _), batches in zip(todo, readable_chunks(views, [chunk for _, chunk in todo], batch)):
            parts = []
            for indices, items in batches:
                if len(items["index"]):
                    parts.append(_pooled(space, pools, images, items))
                done += len(indices)
                advance(done)
            parts = parts or [_nothing(space, pools)]  # none of these images can be read
            columns = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
            for pool, place in places.items():
                with aside(_file(place, k)) as hidden:
                    save_file({"features": columns[pool]} | {n: columns[n] for n in ("index", "digest")}, hidden)
    state.wait_for_everyone()


def read_features(space: Latents, pool: Pool, images: Images, data: DataConfig, folder: Path) -> Probed:
    """What `write_features` has written for the same arguments, without images that could not be read.

    Raises:
        OutputError: a file is damaged; an image that could not be read then can be now.
    """
    place = _place(folder, space, pool, images, data)
    parts = [_load(_file(place, k)) for k in range(len(_chunks(images)))]
    features, index, digests = (torch.cat([part[name] for part in parts]) for name in ("features", "index", "digest"))
    check_left_out(images, index.tolist(), place, data.on_broken)
    labels = torch.tensor(images.labels)[index]
    order = torch.from_numpy(np.lexsort((labels.numpy(), digests.numpy())))
    names = [images.names[i] for i in index[order].tolist()]
    return Probed(features[order], labels[order], digests[order], names)


class _Digested(Views):
    """Items of `Views` with `digest`, 64 bits of the SHA-256 of the whole image, whatever is cropped out of it."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        index, image, label = read(self.images, index, self.config.on_broken)
        self.check_size(index, image)
        digest = int.from_bytes(pixels_sha256(image)[:8], "big", signed=True)
        return {"image": to_tensor(center_crop(image, self.size)), "label": label, "index": index, "digest": digest}


def _pooled(space: Latents, pools: Sequence[Pool], images: Images, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is kept of a batch: pooled latents, `index` and `digest`."""
    z = space.encode(to_unit(items["image"].to(process_state().device)))
    _check_finite(z, space.name, [images.names[i] for i in items["index"].tolist()])
    return {pool: POOLS[pool](z).cpu() for pool in pools} | {name: items[name] for name in ("index", "digest")}


def _check_finite(z: Tensor, name: str, images: Sequence[str]) -> None:
    finite = z.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        raise FloatingPointError(
            f"{images[finite.index(False)]}: its latents by {name} are not finite ({finite.count(False)} of "
            f"{len(finite)} in this batch); a probe of them would mean nothing. Look at the image and at the weights."
        )


def _nothing(space: Latents, pools: Sequence[Pool]) -> dict[str, Tensor]:
    none = torch.empty(0, dtype=torch.int64)
    return {pool: POOLS[pool](torch.empty(0, *space.shape)) for pool in pools} | {"index": none, "digest": none}


# --- files -----------------------------------------------------------------------------------------------------------


def _about(space: Latents, pool: Pool, images: Images, data: DataConfig) -> dict[str, Any]:
    """What decides the features."""
    return {
        "latents": space.identity,
        "image_size": list(space.image_size),
        "pool": pool,
        "images": images.identity,
        "count": len(images),
        "enlarge": data.enlarge,
        "on_broken": data.on_broken,
    }


def _place(folder: Path, space: Latents, pool: Pool, images: Images, data: DataConfig) -> Path:
    name = re.sub(r"[^\w.@-]+", "_", Path(space.name).name)
    about = json.dumps(_about(space, pool, images, data), sort_keys=True)
    return folder / f"{name}-{pool}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"


def _chunks(images: Images) -> list[range]:
    return [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]


def _file(place: Path, chunk: int) -> Path:
    return place / f"{chunk:06d}.safetensors"


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{file} is damaged ({error}); delete it and run the same command again.") from error
