"""Pictures and figures for the report, from what the two stages saved."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rae.autoencoder.encoders import load_encoder
from rae.autoencoder.rae import RAE
from rae.data.images import DataConfig, Images, Views, open_images, open_split, to_bytes, to_unit
from rae.demo.studies import Study
from rae.diffusion.flow import data_from_velocity
from rae.diffusion.guidance import CFG, AutoGuidance
from rae.diffusion.model import DiffusionModel
from rae.diffusion.sampling import euler, generate, time_grid
from rae.evaluation.classifier import Classifier, fit_classifier
from rae.evaluation.reconstruction import psnr, ssim
from rae.evaluation.report import Figure
from rae.training.checkpoint import checkpoints
from rae.training.latents import cache_latents


class Findings(NamedTuple):
    """Pictures by name, uint8 [..., h, w, 3], and figures."""

    pictures: dict[str, np.ndarray] = {}  # noqa: RUF012  never written to
    figures: Sequence[Figure] = ()


# --- stage 1 ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_decoder(study: Study) -> Findings:
    """Reconstructions of held-out images and of images seen in training, beside the originals."""
    rae, (train, held_out) = RAE.from_pretrained(study.folder / "decoder"), open_split(study.decoder.data)
    pictures, figures = {}, []
    for name, images in (("held_out", held_out), ("seen", train)):
        views = Views(images, study.decoder.data, rae.output_size)
        original = torch.stack([views[i]["image"] for i in range(min(len(views), 200))])
        decoded = torch.cat([to_bytes(rae.reconstruct(to_unit(part))) for part in original.split(32)])
        shown = _one_of_each([views[i]["label"] for i in range(len(original))])[: study.row]
        pictures |= {f"{name}_original": _hwc(original[shown]), f"{name}_decoded": _hwc(decoded[shown])}
        pair, kind = (to_unit(decoded), to_unit(original)), {"held_out": "held-out images", "seen": "training images"}
        protocol = f"{len(original)} of {len(views)}, {' x '.join(map(str, rae.output_size))} px, 8-bit, fp32"
        figures += [
            Figure(name=f"PSNR of {kind[name]}", value=f"{psnr(*pair).mean():.1f} dB", protocol=protocol),
            Figure(name=f"SSIM of {kind[name]}", value=f"{ssim(*pair).mean():.3f}", protocol=protocol),
        ]
        if study.judged and name == "held_out":
            judge, labels = _judge(train), torch.tensor([views[i]["label"] for i in range(len(original))]).numpy()
            read = [f"{(judge.predict(_hwc(x)) == labels).mean():.1%}" for x in (decoded, original)]
            figures.append(
                Figure(
                    name="held-out reconstructions read as what they show",
                    value=f"{read[0]} (originals: {read[1]})",
                    protocol=f"{len(original)} held-out images, none of them seen by decoder or classifier; "
                    f"{_describe_judge(judge)}",
                )
            )
    return Findings(pictures, figures)


@torch.no_grad()
def measure_latents(study: Study) -> Findings:
    """Patch tokens of whole photographs in three colours: their three principal components, over all images shown."""
    size, images = (study.whole_side, study.whole_side), open_images(study.whole)
    encoder = load_encoder(study.decoder.encoder.name, image_size=size)
    views = Views(images, DataConfig(source=study.whole, enlarge=True, on_broken="skip"), size)
    shown = [views[i]["image"] for i in np.linspace(0, len(images) - 1, min(len(images), 8)).round().astype(int)]
    tokens = torch.cat([encoder(to_unit(image[None])) for image in shown])
    flat = tokens.flatten(0, 1).double()
    _, components = torch.linalg.eigh(flat.T.cov())  # ascending
    colours = (flat - flat.mean(0)) @ components[:, -3:].flip(1)
    low, high = colours.quantile(torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    colours = ((colours - low) / (high - low)).float().view(len(shown), *encoder.grid, 3)
    return Findings({"pca_images": _hwc(torch.stack(shown)), "pca": _hwc(to_bytes(colours.permute(0, 3, 1, 2)))})


# --- stage 2 ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_samples(study: Study) -> Findings:
    """Samples with and without guidance, how they come about, and the training images nearest to them."""
    rae, model = RAE.from_pretrained(study.folder / "decoder"), DiffusionModel.from_pretrained(study.folder / "dit")
    count, steps, known_classes = study.sampling.count, study.sampling.steps, model.config.network.num_classes
    classes = min(known_classes, study.row)  # those that are sampled
    train, held_out = open_split(study.dit.data)
    judge, labels = _judge(train) if study.judged else None, [i % classes for i in range(count)] if classes else None
    trained = int(checkpoints(study.folder / "dit")[-1].name)
    asked = f"{classes} of {known_classes} classes in turn" if classes else "no classes"
    protocol = (
        f'{count} images, {asked}, seeds 0 to {count - 1}, Euler, {steps} calls (grid "calls"), '
        f"EMA weights after {trained:,} images seen, fp32"
    )
    pictures, figures, made, latents = {}, [], {}, {}
    guidances = _guidances(study, model)
    for kind, (guidance, description) in guidances.items():
        settings = {"steps": steps, "grid": "calls", "guidance": guidance, "batch_size": 100}
        batches = list(generate(model, rae, labels, range(count), **settings))
        made[kind], latents[kind] = (
            to_bytes(torch.cat([b.images for b in batches])),
            torch.cat([b.latents for b in batches]),
        )
        pictures[f"samples_{kind}"] = _hwc(_rows_of_classes(made[kind], classes, study.row))
        if judge:
            right = (judge.predict(_hwc(made[kind])) == np.array(labels)).mean()
            name, how = (
                f"samples read as the asked class, {kind}",
                f"{protocol}; {description}; {_describe_judge(judge)}",
            )
            figures.append(Figure(name=name, value=f"{right:.1%}", protocol=how))
    best = "CFG" if classes else "unguided"
    pictures |= _steps_from_noise(study, model, rae, guidances[best][0])

    data = study.dit.data.model_copy(update={"flip": False})
    known, fresh = (cache_latents(rae, images, data).latents[0] for images in (train, held_out))
    nearest = torch.cdist(latents[best].flatten(1), known.flatten(1)).argmin(1)[: study.row]
    views = Views(train, data, rae.image_size)
    pictures["nearest"] = _hwc(torch.stack([views[i]["image"] for i in nearest.tolist()]))
    pictures["nearest_to"] = _hwc(made[best][: len(nearest)])
    distances = {kind: _nearest_distance(z, known) for kind, z in (latents | {"held-out real": fresh}).items()}
    figures.append(
        Figure(
            name="distance to the nearest training image",
            value=", ".join(f"{kind} {distance:.3f}" for kind, distance in distances.items()),
            protocol=f"median over the images of the RMS difference of standardised latents, {len(known)} training and "
            f"{len(fresh)} held-out images; far below the last one = copies of training images; {protocol}",
        )
    )
    return Findings(pictures, figures)


def _guidances(study: Study, model: DiffusionModel) -> dict[str, tuple[CFG | AutoGuidance | None, str]]:
    """Each kind of guidance that the model allows, and what it is in words."""
    sampling, saved = study.sampling, checkpoints(study.folder / "dit")
    kinds = {"unguided": (None, "no guidance")}
    if model.config.network.num_classes:
        kinds["CFG"] = CFG(sampling.cfg), f"CFG {sampling.cfg:g} at all times"
    weak, share = DiffusionModel.from_pretrained(saved[0] / "model"), int(saved[0].name) / int(saved[-1].name)
    words = f"AutoGuidance {sampling.autoguidance:g} by the same run's checkpoint at {share:.0%}"
    kinds["AutoGuidance"] = AutoGuidance(weak, sampling.autoguidance), words
    return kinds


def _steps_from_noise(study: Study, model: DiffusionModel, rae: RAE, guidance: CFG | None) -> dict[str, np.ndarray]:
    """x_t and the data estimated from it, x_t - t v, both decoded, at a few times of the first images' trajectories."""
    count, classes, steps = 5, model.config.network.num_classes, study.sampling.steps
    y = torch.tensor([(2 * i) % classes if classes else model.null_label for i in range(count)])
    noise = [torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    times = time_grid(steps, model.flow.shift, "calls")
    velocity = guidance.wrap(model) if guidance else model
    states = list(euler(velocity, torch.stack(noise), y, times))
    shown = sorted({i * steps // 8 for i in range(8)})
    estimates = []
    for k in shown:
        v = (states[k + 1] - states[k]) / (times[k + 1] - times[k])
        estimates.append(rae.decode(data_from_velocity(v, states[k], times[k].expand(count))))
    rows = torch.stack([*estimates, rae.decode(states[-1])], dim=1)  # [count, T, 3, h, w]
    path = torch.stack([rae.decode(states[k][:1])[0] for k in [*shown, steps]])
    strips = torch.cat([path[None], rows])
    return {"strips": _hwc(to_bytes(strips)), "strip_times": times[[*shown, steps]].numpy()}


# --- images -----------------------------------------------------------------------------------------------------------


def _rows_of_classes(images: Tensor, classes: int, most: int) -> Tensor:
    """Images whose classes take turns [n,...] -> [rows, columns, ...], a row for each class, `most` columns at most."""
    if not classes:
        columns = min(most, len(images))
        return images[: len(images) // columns * columns].unflatten(0, (-1, columns))
    return torch.stack([images[c::classes][: min(most, len(images) // classes)] for c in range(classes)])


def _one_of_each(labels: Sequence[int]) -> list[int]:
    """Indices in an order that takes the classes in turn."""
    seen: dict[int, int] = {}
    turns = []
    for label in labels:
        turns.append(seen.get(label, 0))
        seen[label] = turns[-1] + 1
    return sorted(range(len(labels)), key=lambda i: (turns[i], labels[i]))


def _judge(train: Images) -> Classifier:
    images, labels = zip(*(train[i] for i in range(len(train))))
    return fit_classifier(images, labels, seed=0)


def _describe_judge(judge: Classifier) -> str:
    return (
        f"classifier: SVM on 16 x 16 grey pixels, reads {judge.accuracy:.1%} of {judge.held_out} real ones it never saw"
    )


def _nearest_distance(z: Tensor, known: Tensor) -> float:
    return float(torch.cdist(z.flatten(1), known.flatten(1)).min(1).values.median() / z[0].numel() ** 0.5)


def _hwc(images: Tensor) -> np.ndarray:
    return images.movedim(-3, -1).contiguous().numpy()  # uint8 [..., 3, h, w] -> [..., h, w, 3]
