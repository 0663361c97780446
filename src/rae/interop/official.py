"""The authors' published files (github.com/bytetriper/RAE) -> our models, strictly.

What they publish, all written by `torch.save`:

    file                    content
    decoder (model.pt)      state dict of the decoder: decoder_embed.weight, decoder_layers.0..., trainable_cls_token
    autoencoder, training   {"model", "ema", "optimizer", ...}; keys encoder.*, decoder.*
    statistics (stat.pt)    {"mean", "var"}, each [C,h,w]
    stage 2                 {"model", "ema", ...} or one state dict; LightningDiT or DiT-DH (DiTwDDTHead)

Sizes are read off the shapes. What a file does not say (encoder, statistics, shift, a decoder's heads) is asked for,
never guessed. A missing, unexpected or misshapen key is an error. This is the one module that opens pickles, with
`weights_only=True`, so that opening a file runs none of its code. The same tensors as safetensors are read as well.
"""

import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rae.autoencoder.decoder import DECODERS, Decoder, DecoderConfig
from rae.autoencoder.latents import LatentStats
from rae.config import parse
from rae.data.class_names import read_class_names
from rae.diffusion.dit import rotary_angles
from rae.diffusion.flow import Flow
from rae.diffusion.model import DiffusionModel, DiffusionModelConfig
from rae.folders import saved_kind
from rae.training.discriminator import Discriminator

Weights = Literal["ema", "model"]
StateDict = dict[str, Tensor]
KeyTable = tuple[tuple[str, tuple[str, ...]], ...]


class ConversionError(ValueError):
    """A file that is not what it should be; the message names the file, the keys and the likely reason."""


# --- key tables: pattern of our name -> their name, or names, which are then stacked along the first axis ------------

DECODER_KEYS: KeyTable = (
    (r"cls_token", ("trainable_cls_token",)),
    (r"positions", ("decoder_pos_embed",)),
    (r"embed\.(\w+)", (r"decoder_embed.\1",)),
    (r"blocks\.(\d+)\.norm1\.(\w+)", (r"decoder_layers.\1.layernorm_before.\2",)),
    (
        r"blocks\.(\d+)\.qkv\.(\w+)",
        tuple(rf"decoder_layers.\1.attention.attention.{part}.\2" for part in ("query", "key", "value")),
    ),
    (r"blocks\.(\d+)\.out\.(\w+)", (r"decoder_layers.\1.attention.output.dense.\2",)),
    (r"blocks\.(\d+)\.norm2\.(\w+)", (r"decoder_layers.\1.layernorm_after.\2",)),
    (r"blocks\.(\d+)\.up\.(\w+)", (r"decoder_layers.\1.intermediate.dense.\2",)),
    (r"blocks\.(\d+)\.down\.(\w+)", (r"decoder_layers.\1.output.dense.\2",)),
    (r"norm\.(\w+)", (r"decoder_norm.\1",)),
    (r"head\.(\w+)", (r"decoder_pred.\1",)),
)

_STAGE2_KEYS: KeyTable = (
    (r"position", ("pos_embed",)),
    (r"time\.frequencies", ("t_embedder.W",)),
    (r"time\.mlp\.(\d)\.(\w+)", (r"t_embedder.mlp.\1.\2",)),
    (r"labels\.weight", ("y_embedder.embedding_table.weight",)),
    (r"blocks\.(\d+)\.modulation\.(\w+)", (r"blocks.\1.adaLN_modulation.1.\2",)),  # the head's are numbered on
    (r"blocks\.(\d+)\.((?:attn|mlp|norm1|norm2)\..+)", (r"blocks.\1.\2",)),
    (r"final\.norm\.weight", ("final_layer.norm_final.weight",)),
    (r"final\.modulation\.(\w+)", (r"final_layer.adaLN_modulation.1.\1",)),
    (r"final\.linear\.(\w+)", (r"final_layer.linear.\1",)),
)
DIT_KEYS: KeyTable = (*_STAGE2_KEYS, (r"embed\.(\w+)", (r"x_embedder.proj.\1",)))
DITDH_KEYS: KeyTable = (
    *_STAGE2_KEYS,
    (r"embed\.(\w+)", (r"s_embedder.proj.\1",)),
    (r"head_embed\.(\w+)", (r"x_embedder.proj.\1",)),
    (r"head_condition\.(\w+)", (r"s_projector.\1",)),
)


# --- reading ---------------------------------------------------------------------------------------------------------

_CONVOLUTION = {"weight": "weight_orig", "bias": "bias", "u": "weight_u", "v": "weight_v"}
_LAYERS = {"conv1": "0.0", "norm1": "0.1", "conv2": "1.fn.0", "norm2": "1.fn.1", "out": "2"}
DISCRIMINATOR_KEYS: KeyTable = tuple(
    (rf"heads\.(\d+)\.{ours}\.{part}", (rf"heads.\1.{theirs}.{part if 'norm' in ours else name}",))
    for ours, theirs in _LAYERS.items()
    for part, name in _CONVOLUTION.items()
)


def read_file(path: str | Path) -> dict:
    """The content of a `.pt` file (or of a safetensors file), on the CPU; large files are mapped, not copied.

    Raises:
        ConversionError: no such file, a damaged one, or a pickle of anything but tensors and plain containers.
    """
    path = Path(path)
    if kind := saved_kind(path):
        raise ConversionError(f"{path} holds no file of the authors but our {kind}: other commands take it as it is.")
    if path.is_dir():
        raise ConversionError(f"{path} is a folder; give the file in it.")
    if not path.is_file():
        raise ConversionError(f"{path}: no such file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # files of torch before 1.6 are no archives, and cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        call = re.search(r"GLOBAL (\S+)", str(error))
        what = f"calls {call[1]} when it is opened" if call else "is not a file of tensors by torch"
        raise ConversionError(f"{path} {what}; only tensors in plain containers are read.") from error
    except Exception as error:  # a damaged pickle may end in any
        raise ConversionError(f"{path} is damaged, cut short or not a torch file: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors.")
    return content


def read_weights(path: str | Path, weights: Weights = "ema") -> StateDict:
    """One state dict of a file, in float32, without the prefixes that wrappers leave ("module.", "_orig_mod.").

    Args:
        path: a training checkpoint, {"model": ..., "ema": ...}, or a file that is one state dict itself.
        weights: which of a training checkpoint; a file with a single state dict has no choice.

    Raises:
        ConversionError: the checkpoint lacks the weights asked for, or an entry is no tensor.
    """
    content = read_file(path)
    if content.keys() & {"model", "ema"}:
        if not isinstance(content.get(weights), dict):
            other = "model" if weights == "ema" else "ema"
            remedy = f" Take those: --weights {other}." if isinstance(content.get(other), dict) else ""
            has = ", ".join(repr(key) for key, value in content.items() if value is not None)
            raise ConversionError(f"{path} has no {weights!r} weights; it has {has}.{remedy}")
        content = content[weights]
    others = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise ConversionError(
            f"{path}: {_some(others)} in the state dict are no tensors with names; this is another kind of file."
        )
    return {re.sub(r"^((module|_orig_mod)\.)+", "", key): value.float() for key, value in content.items()}


def read_statistics(path: str | Path) -> tuple[Tensor, Tensor]:
    """Mean and variance [C,h,w] of a statistics file: theirs, {"mean", "var"}, or one of `rae stats` (`LatentStats`).

    The variance floor eps (1e-5) is in neither.

    Raises:
        ConversionError: other keys, shapes that differ or are not [C,h,w], a negative variance.
    """
    content = read_file(path)
    if set(content) == {"count", "mean", "m2"}:
        stats = LatentStats.load(path)
        content = {"mean": stats.mean, "var": stats.var}
    if set(content) != {"mean", "var"} or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConversionError(f"{path} holds {_some(content)}, not the 'mean' and 'var' of latent statistics.")
    mean, var = (content[key].float() for key in ("mean", "var"))
    if mean.ndim != 3 or mean.shape != var.shape:
        raise ConversionError(f"{path}: mean {list(mean.shape)} and var {list(var.shape)} must both be [C,h,w].")
    if not (mean.isfinite().all() and var.isfinite().all() and var.min() >= 0):
        raise ConversionError(f"{path}: the statistics are not finite, or a variance is negative.")
    return mean, var


def running_statistics(processes: Sequence[Iterable[Tensor]], momentum: float = 0.1) -> tuple[Tensor, Tensor]:
    """Latent statistics as the authors' script makes them, to compare with a published stat.pt.

        r <- (1 - momentum) r + momentum (mean, variance of the batch),  from r = (0, 1)

    The last 10 to 20 batches decide, and the variance between batches is left out: an estimate that depends on the
    order of the data. `LatentStats` is exact; use this one for nothing else.

    Args:
        processes: for each process its batches [B,C,h,w].
        momentum: weight of a new batch.

    Returns:
        mean and variance [C,h,w]: over processes, the mean of means, and the mean of variances plus variance of means.
    """
    means, variances = [], []
    for batches in processes:
        mean, var = 0.0, 1.0
        for batch in batches:
            mean = (1 - momentum) * mean + momentum * batch.mean(0)
            var = (1 - momentum) * var + momentum * batch.var(0, correction=0)
        means.append(mean)
        variances.append(var)
    means = torch.stack(means)
    return means.mean(0), torch.stack(variances).mean(0) + means.var(0, correction=0)


# --- decoder ---------------------------------------------------------------------------------------------------------


def convert_decoder(
    path: str | Path,
    *,
    weights: Weights = "ema",
    heads: int | None = None,
    grid: tuple[int, int] | None = None,
    norm_eps: float = 1e-12,
) -> Decoder:
    """A published decoder, from a decoder file or a whole-autoencoder checkpoint (its encoder.* keys are left out).

    Args:
        path: the file.
        weights: see `read_weights`.
        heads: attention heads; None where a size of `DECODERS` has the file's width, depth and MLP width.
        grid: (h, w) of the tokens if it is not square.
        norm_eps: eps of the LayerNorms; 1e-12 in every published decoder.

    Raises:
        ConversionError: see the module.
    """
    state = read_weights(path, weights)
    if any(key.startswith("decoder.") for key in state):
        # an autoencoder: what is neither encoder nor decoder stays, and is then unexpected
        state = {key.removeprefix("decoder."): v for key, v in state.items() if not key.startswith("encoder.")}
    width, latent_channels = _shape(state, "decoder_embed.weight", 2, path)
    depth = _count(state, r"decoder_layers\.(\d+)\.")
    mlp_width = _shape(state, "decoder_layers.0.intermediate.dense.weight", 2, path)[0]
    patch_size = math.isqrt(_shape(state, "decoder_pred.weight", 2, path)[0] // 3)
    if heads is None:
        found = [row[2] for row in DECODERS.values() if (row[0], row[1], row[3]) == (width, depth, mlp_width)]
        if not found:
            raise ConversionError(
                f"{path}: no published decoder has width {width}, {depth} layers and MLP width {mlp_width}, and the "
                "number of attention heads cannot be read off the weights; give heads=."
            )
        heads = found[0]
    config = {
        "latent_channels": latent_channels,
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_width": mlp_width,
        "patch_size": patch_size,
        "grid": grid or _square(_shape(state, "decoder_pos_embed", 3, path)[1] - 1, path),
        "norm_eps": norm_eps,
    }
    return _load(Decoder(parse(DecoderConfig, config, str(path))), state, DECODER_KEYS, path).requires_grad_(False)


# --- stage 2 ---------------------------------------------------------------------------------------------------------


def convert_stage2(
    path: str | Path,
    *,
    flow: Flow,
    weights: Weights = "ema",
    head_depth: int | None = None,
    mlp_ratio: float = 4.0,
    latent_identity: str | None = None,
    class_names: str | Path | None = None,
) -> DiffusionModel:
    """A published DiT or DiT-DH.

    Heads and grid are read off the rotary tables, which are then checked against the formula and left out.

    Args:
        path: the file.
        flow: prediction, training times and shift, which the file does not hold: `Flow.for_latents((C, h, w))`.
        weights: see `read_weights`.
        head_depth: blocks of a DiT-DH's head; needed only if it is as wide as the rest.
        mlp_ratio: 4 in every published model.
        latent_identity: `RAE.latent_identity` of the autoencoder it belongs to.
        class_names: file that names the classes in the order of their numbers (`read_class_names`); None: no names.

    Raises:
        ConversionError: see the module.
        ImageError: names that do not fit.
    """
    state = read_weights(path, weights)
    is_dh = "s_embedder.proj.weight" in state
    first = "s_embedder.proj.weight" if is_dh else "x_embedder.proj.weight"
    width, in_channels, patch_size, _ = _shape(state, first, 4, path)
    token_grid = _square(_shape(state, "pos_embed", 3, path)[1], path)
    depth = _count(state, r"blocks\.(\d+)\.")
    head = {}
    if not is_dh and head_depth is not None:
        raise ConversionError(f"{path} is a DiT without a head, to which head_depth={head_depth} does not apply.")
    if is_dh:
        head_width = _shape(state, "x_embedder.proj.weight", 4, path)[0]
        if head_depth is None:
            if head_width == width:
                raise ConversionError(
                    f"{path}: head and base are both {width} wide, so the weights do not tell how many of the {depth} "
                    "blocks are the head's; give head_depth=."
                )
            widths = [_shape(state, f"blocks.{i}.norm1.weight", 1, path)[0] for i in range(depth)]
            head_depth = widths.count(head_width)
        depth -= head_depth
        head_heads = _pop_heads(state, "dec_feat_rope", head_width, token_grid, path)
        head = {"head_width": head_width, "head_heads": head_heads, "head_depth": head_depth}
    num_classes = _shape(state, "y_embedder.embedding_table.weight", 2, path)[0] - 1
    names = class_names and read_class_names(
        class_names, [*map(str, range(num_classes))], where=str(class_names), whose=str(path)
    )
    network = {
        "kind": "dit-dh" if is_dh else "dit",
        "in_channels": in_channels,
        "grid": [side * patch_size for side in token_grid],
        "patch_size": patch_size,
        "width": width,
        "heads": _pop_heads(state, "enc_feat_rope" if is_dh else "feat_rope", width, token_grid, path),
        "depth": depth,
        "num_classes": num_classes,
        "mlp_ratio": mlp_ratio,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "allow_narrow": (head_width if is_dh else width) < in_channels * patch_size**2,  # it exists, whatever its width
        **head,
    }
    config = {"network": network, "flow": flow, "latent_identity": latent_identity, "class_names": names}
    model = DiffusionModel(parse(DiffusionModelConfig, config, str(path)))
    _load(model.network, state, DITDH_KEYS if is_dh else DIT_KEYS, path, head_start=depth)
    return model.requires_grad_(False)


def convert_discriminator(
    model: Discriminator, state: Mapping[str, Tensor], path: str | Path = "discriminator"
) -> None:
    """Load the heads of the authors' discriminator, with the vectors of their spectral norms, into ours."""
    _load(model, dict(state), DISCRIMINATOR_KEYS, path)


def _pop_heads(state: StateDict, name: str, width: int, token_grid: tuple[int, int], path: str | Path) -> int:
    """Take the rotary tables `name` out of the state dict, check them, and return the number of heads they imply."""
    head_dim = _shape(state, f"{name}.freqs_cos", 2, path)[1]
    angles = rotary_angles(token_grid, head_dim).repeat_interleave(2, dim=1)
    for key, expected in ((f"{name}.freqs_cos", angles.cos()), (f"{name}.freqs_sin", angles.sin())):
        found = state.pop(key, torch.empty(0))
        # the tables' own rounding, in half precision too; another frequency or grid is off by the order of 1
        if found.shape != expected.shape or not (found - expected).abs().max() <= 1e-2:  # NaN is no table either
            raise ConversionError(
                f"{path}: {key} {list(found.shape)} is not the rotary table of a {token_grid[0]} x {token_grid[1]} "
                f"grid with head dimension {head_dim}; the model was trained with another rotary embedding than ours."
            )
    return width // head_dim


# --- strict loading --------------------------------------------------------------------------------------------------


def _load(module: nn.Module, state: StateDict, table: KeyTable, path: str | Path, head_start: int = 0) -> nn.Module:
    """Fill `module` from their state dict; every one of their keys is used, every one of ours is filled."""
    sources = {ours: _their_names(ours, table, head_start) for ours in module.state_dict()}
    wanted = [name for names in sources.values() for name in names]
    missing = [name for name in wanted if name not in state]
    unexpected = sorted(state.keys() - set(wanted))
    if missing or unexpected:
        raise ConversionError(
            f"{path} does not fit a published {type(module).__name__}: {len(missing)} keys missing ({_some(missing)}), "
            f"{len(unexpected)} unexpected ({_some(unexpected)}). The file is cut, of another kind, or of a model with "
            "options that no published one uses (LayerNorm, plain MLP, no position table)."
        )
    filled, misshapen = {}, []
    for ours, parameter in module.state_dict().items():
        names = sources[ours]
        shape = [len(parameter) // len(names), *parameter.shape[1:]]
        filled[ours] = pieces = [_with_axes(state[name], len(shape)) for name in names]
        misshapen += [
            f"{name} {list(state[name].shape)} where {shape} is needed"
            for name, piece in zip(names, pieces)
            if list(piece.shape) != shape
        ]
    if misshapen:
        raise ConversionError(
            f"{path}: {len(misshapen)} tensors of other shapes: {_some(misshapen)}. The sizes in the file contradict "
            "each other, or it was made with other options (MLP ratio, modulation without shift)."
        )
    wild = [name for ours, pieces in filled.items() for name, x in zip(sources[ours], pieces) if not x.isfinite().all()]
    if wild:
        raise ConversionError(
            f"{path}: {len(wild)} tensors hold values that are not finite: {_some(wild)}. The file is damaged, or its "
            "training diverged; take an earlier one, or the other of --weights ema and model."
        )
    module.load_state_dict({ours: torch.cat(pieces) for ours, pieces in filled.items()})
    return module


def _with_axes(tensor: Tensor, axes: int) -> Tensor:
    if tensor.ndim == 4:
        return tensor.flatten(1)  # patch embeddings are convolutions there, linear layers here
    if tensor.ndim == axes + 1 and len(tensor) == 1:
        return tensor[0]  # position tables have a batch axis there
    return tensor


def _their_names(ours: str, table: KeyTable, head_start: int) -> list[str]:
    # theirs number base and head in one list
    name = re.sub(r"^head_blocks\.(\d+)", lambda match: f"blocks.{head_start + int(match[1])}", ours)
    for pattern, templates in table:
        if match := re.fullmatch(pattern, name):
            return [match.expand(template) for template in templates]
    raise KeyError(f"no row of the key table is about {ours!r}")


def _shape(state: StateDict, key: str, axes: int, path: str | Path) -> tuple[int, ...]:
    if key not in state:
        raise ConversionError(f"{path} has no {key!r}, but {_some(state)}; it is another kind of file, or it is cut.")
    if state[key].ndim != axes:
        raise ConversionError(f"{path}: {key} {list(state[key].shape)} should have {axes} axes.")
    return tuple(state[key].shape)


def _count(state: StateDict, pattern: str) -> int:
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)


def _square(tokens: int, path: str | Path) -> tuple[int, int]:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ConversionError(f"{path}: {tokens} tokens are not a square grid; give grid=(h, w) where it is offered.")
    return side, side


def _some(names: Iterable[object]) -> str:
    """Up to three names, and how many more there are."""
    names = [str(name) for name in names]
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"
