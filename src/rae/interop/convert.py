"""`rae convert`: one of the authors' files in, a folder of ours out."""

import hashlib
import json
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

from rae.autoencoder.encoders import Encoder, EncoderConfig, load_encoder
from rae.autoencoder.rae import RAE
from rae.config import parse
from rae.diffusion.flow import Flow
from rae.diffusion.model import DiffusionModel
from rae.interop.official import (
    ConversionError,
    StateDict,
    Weights,
    convert_decoder,
    convert_stage2,
    read_file,
    read_statistics,
    read_weights,
)

Kind = Literal["decoder", "autoencoder", "stage 2"]


def convert(
    path: str | Path,
    out: str | Path,
    *,
    weights: Weights = "ema",
    encoder: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    statistics: str | Path | None = None,
    heads: int | None = None,
    shift: float | None = None,
    time_law: Literal["uniform", "logit-normal"] | None = None,
    autoencoder: str | Path | None = None,
    head_depth: int | None = None,
    class_names: str | Path | None = None,
    console: Console | None = None,
) -> RAE | DiffusionModel:
    """Convert a decoder or autoencoder into an `RAE` folder, a stage-2 file into a `DiffusionModel` folder.

    Args:
        path: the authors' file; which kind it is, its keys tell.
        out: folder to write; must not exist, or be empty.
        weights: "ema" or "model", where a training checkpoint holds both.
        encoder: (decoder) name, hub id or folder of the encoder it was trained with, as for `load_encoder`.
        image_size: (decoder) of the images that are encoded, in pixels: 256 or 512 for the published ones.
        statistics: (decoder) the stat.pt that belongs to it; a file of `rae stats`, taken with the same encoder and
            image size; or "none" for latents that are not standardised.
        heads: (decoder) attention heads, if its size is not a published one.
        shift: (stage 2) sqrt(C h w / 4096): 6.928 for DINOv2-B at 256 pixels, 13.856 at 512.
        time_law: (stage 2) of training times, for training on. Sampling does not use it.
        autoencoder: (stage 2) the converted autoencoder whose latents it generates; None leaves the model unbound.
        head_depth: (stage 2) blocks of the head, if the widths do not tell.
        class_names: (stage 2) file that names the classes in the order of their numbers, so that they can be asked for
            by name; None: by number alone.
        console: where to report.

    Raises:
        ConversionError: a foreign or damaged file, or something that is needed and not given, or given and not used.
        ImageError: class names that do not fit.
    """
    console, out = console or Console(), Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConversionError(f"{out} exists and is not an empty folder; give another one.")
    with console.status(escape(f"reading {path}")):
        kind = detect(path, weights)
    of_decoder = {"encoder": encoder, "image_size": image_size, "statistics": statistics}
    of_stage2 = {"shift": shift, "time_law": time_law}
    if kind == "stage 2":
        _check_given(path, kind, needed=of_stage2, foreign=of_decoder | {"heads": heads})
        with console.status(escape(f"converting {path}")):
            bound_to = RAE.from_pretrained(autoencoder) if autoencoder else None
            model = convert_stage2(
                path,
                flow=Flow(shift=shift, time_law=time_law),
                weights=weights,
                head_depth=head_depth,
                class_names=class_names,
                latent_identity=bound_to.latent_identity if bound_to else None,
            )
            if bound_to:
                model.check_autoencoder(bound_to)
    else:
        foreign = of_stage2 | {"autoencoder": autoencoder, "head_depth": head_depth, "class_names": class_names}
        _check_given(path, kind, needed=of_decoder, foreign=foreign)
        with console.status(escape(f"converting {path}")):
            decoder = convert_decoder(path, weights=weights, heads=heads)
            stats = None if statistics == "none" else read_statistics(statistics)
        with console.status(escape(f"loading the encoder {encoder}")):
            network = load_encoder(encoder, image_size=image_size)
            if stats:
                _check_statistics(statistics, network)
            model = RAE(network, decoder, stats)
        if model.encoder.grid != decoder.config.grid:
            raise ConversionError(
                f"{encoder} makes {model.encoder.grid} tokens of images of {model.image_size} pixels, the decoder in "
                f"{path} was trained on {decoder.config.grid}; give the image size it was trained with."
            )
        if kind == "autoencoder":
            _check_encoder(read_weights(path, weights), model.encoder, path)
    with console.status(escape(f"writing {out}")):
        model.save_pretrained(out)
    console.print(_summary(path, kind, model, out))
    if kind == "stage 2" and abs(shift / _usual_shift(model) - 1) > 1e-3:
        console.print(
            f"The shift {shift:g} is not the one of these latents, {_usual_shift(model):.4f}; samples suffer unless it "
            "was trained with it.",
            style="yellow",
        )
    return model


def detect(path: str | Path, weights: Weights = "ema") -> Kind:
    """What kind of file it is, by its keys.

    Raises:
        ConversionError: none that can be converted by itself.
    """
    if set(read_file(path)) in ({"mean", "var"}, {"count", "mean", "m2"}):
        raise ConversionError(f"{path} holds latent statistics; give it as statistics= when you convert the decoder.")
    state = read_weights(path, weights)
    for key, kind in (
        ("decoder_pred.weight", "decoder"),
        ("decoder.decoder_pred.weight", "autoencoder"),
        ("x_embedder.proj.weight", "stage 2"),
    ):
        if key in state:
            return kind
    raise ConversionError(
        f"{path} is neither a decoder, an autoencoder nor a stage-2 model: its keys begin with {sorted(state)[:3]}."
    )


def _check_given(path: str | Path, kind: Kind, needed: dict, foreign: dict) -> None:
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ConversionError(f"{path} is of kind {kind!r} and does not hold its {', '.join(missing)}; give them.")
    unused = [name for name, value in foreign.items() if value is not None]
    if unused:
        raise ConversionError(f"{path} is of kind {kind!r}, to which {', '.join(unused)} does not apply; leave it out.")


def _check_encoder(state: StateDict, encoder: Encoder, path: str | Path) -> None:
    """The frozen encoder in a training checkpoint must be the one named: tensor by tensor, whatever their names."""
    theirs = {_digest(tensor) for key, tensor in state.items() if key.startswith("encoder.")}
    ours = encoder.network.state_dict()
    different = [key for key, tensor in ours.items() if _digest(tensor) not in theirs]
    if different:
        raise ConversionError(
            f"{path} was trained with another encoder than {encoder.config.name}: {len(different)} of {len(ours)} "
            f"tensors are not in it ({', '.join(different[:3])}); name the right one."
        )


def _check_statistics(path: str | Path, encoder: Encoder) -> None:
    """A file of `rae stats` names the encoder and sizes that it was taken with, which must be these; theirs do not."""
    if Path(path).suffix != ".safetensors":
        return
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
    if "encoder" not in about:
        return
    theirs, name = parse(EncoderConfig, json.loads(about["encoder"]), str(path)), encoder.config.name
    for key in ("image_size", "input_size"):
        found, wanted = getattr(theirs, key), getattr(encoder.config, key)
        if found != wanted:
            raise ConversionError(f"{path} was taken with {key} {found}, {name} has {wanted} here; take the same.")
    if about["encoder_checksum"] != encoder.checksum():
        raise ConversionError(
            f"{path} holds statistics of the encoder {theirs.name}, whose weights are not those of {name}: take them "
            f"again, `rae stats {name} IMAGES`."
        )


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).digest()


def _usual_shift(model: DiffusionModel) -> float:
    return Flow.for_latents(model.latent_shape).shift


def _summary(path: str | Path, kind: Kind, model: RAE | DiffusionModel, out: Path) -> Table:
    table = Table(title=escape(f"{path} => {out}"), show_header=False)
    parameters = sum(p.numel() for p in (model.decoder if isinstance(model, RAE) else model).parameters())
    table.add_row("kind", kind)
    table.add_row("parameters", f"{parameters:,}" + (" (decoder)" if isinstance(model, RAE) else ""))
    table.add_row("latents (C, h, w)", str(model.latent_shape))
    if isinstance(model, RAE):
        table.add_row("encoder", escape(f"{model.encoder.config.name}, images of {model.image_size} pixels"))
        table.add_row("statistics", "none: not standardised" if model.latent_mean is None else "included")
        table.add_row("latent identity", model.latent_identity[:12])
    else:
        identity = model.config.latent_identity
        table.add_row(
            "shift", f"{model.flow.shift:.4f}, where sqrt(C h w / 4096), at least 1, is {_usual_shift(model):.4f}"
        )
        names, classes = model.config.class_names, model.config.network.num_classes
        table.add_row("classes", f"{classes:,}, " + (escape(f"{names[0]!r} ...") if names else "without names"))
        table.add_row("bound to latents", identity[:12] if identity else "none: it takes any of this shape")
    for file in sorted(p for p in out.rglob("*") if p.is_file()):
        table.add_row(str(file.relative_to(out)), decimal(file.stat().st_size))
    return table
