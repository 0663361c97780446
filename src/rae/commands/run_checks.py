"""What can be wrong with the folder of a run, of either stage. Nothing is fetched or written.

A check is a function from a `RunRecord` to findings: the first line is what is the matter, the second one the remedy.
"""

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from rich.filesize import decimal

from rae.autoencoder.baselines import is_baseline
from rae.autoencoder.families import ENCODERS
from rae.autoencoder.rae import RAEConfig, saved_latent_identity
from rae.commands.autoencoder_of import is_downloaded, places_of
from rae.commands.run_record import RunRecord
from rae.config import ConfigError, read_json
from rae.data.folders import find_data_files
from rae.data.images import PACKAGED, ImageError
from rae.data.latent_cache import open_cache
from rae.data.latent_format import CacheError
from rae.diffusion.flow import Flow
from rae.evaluation.flow_loss import mean_trivial_loss
from rae.sources import SourceError, source_of
from rae.training.adversarial import health
from rae.training.decoder import DecoderRecipe
from rae.training.diagnosis import lag_warning, trivial_warning
from rae.training.dit_recipe import DiTRecipe
from rae.training.durations import start_warning
from rae.training.objective import PATIENCE
from rae.training.optim import ema_warning
from rae.training.run_folder import flatten, log_damage, size

LOSS_ROSE, DISTANCE_ROSE = 1.05, 1.2  # what chooses `best`, in stage 2 and in stage 1, over the lowest that it was
RISEN, EXPLODED, SLOWED = 1.3, 10, 0.5  # median of the log's last fifth, over that of the lowest fifth, of all, of all
FEW = 10  # with fewer lines of the log no trend is told


# --- the folder ------------------------------------------------------------------------------------------------------


def check_recipe(run: RunRecord) -> Iterator[str]:
    if run.recipe_error:
        yield (
            f"{run.recipe_error}\nTraining cannot go on without it, and nothing is said here of the run's figures. Its "
            "checkpoints are models all the same. If you still have the recipe, put it there."
        )


def check_version(run: RunRecord) -> Iterator[str]:
    if missing := run.missing_state:
        yield (
            f"{run.intact[-1] / 'train/state.json'} has no {', '.join(missing)}: another version of rae wrote it.\nThe "
            "checkpoint is a model all the same; to train on, take the version that began the run."
        )


def check_checkpoints(run: RunRecord) -> Iterator[str]:
    for path, damage in run.damage.items():
        if damage and path == run.newest:
            then = f"goes on from {run.intact[-1].name}" if run.intact else "begins anew, since no older one is intact"
            yield f"{damage}\nRemove the damaged checkpoint, and the same command {then}: rm -r {path}"
        elif damage:
            yield f"{damage}\nRemove it, the run does not need it: rm -r {path}"
    for path, damage in run.kept.items():
        if damage:
            yield f"{damage}\nOnly a new run makes this model again; as it is it cannot be loaded: rm -r {path}"
    for half in sorted([*run.folder.glob("checkpoints/.tmp-*"), *run.folder.glob("kept/.tmp-*")]):
        if not run.running:
            yield (
                f"{half} ({size(half)}) is half a checkpoint: a process was killed while it wrote or removed it.\n"
                "The same command removes it."
            )


def check_pointers(run: RunRecord) -> Iterator[str]:
    there = [path.name for path in run.damage]
    for name in ("latest", "best"):
        path = run.folder / name
        if not path.is_file():
            if name == "latest" and there:
                yield f"{path} is missing, and there are checkpoints.\nThe same command writes it."
            continue
        named = path.read_text(errors="replace").strip()
        remedy = "The same command sets it right." if name == "latest" else f"Remove it: rm {path}"
        if named not in there:
            yield f"{path} names checkpoint {named!r}, which is not there ({', '.join(there) or 'none is'}).\n{remedy}"
        elif name == "latest" and named != there[-1]:
            yield f"{path} names checkpoint {named}, and {there[-1]} is newer.\n{remedy}"


def check_log(run: RunRecord) -> Iterator[str]:
    path = run.folder / "log.jsonl"
    if run.saved and not run.lines:
        yield f"{path} is missing or empty after {run.saved:,} images.\nIts figures are lost; training can go on."
    if run.unreadable:
        yield log_damage(path, run.unreadable)
    if run.cut and not run.running:
        yield f"{path} ends in half a line: a process was killed while it wrote it.\nThe same command removes it."
    places = [0, *(images for images, _ in run.series("loss"))]
    interval = max((b - a for a, b in itertools.pairwise(places)), default=0)
    if interval and run.saved - run.logged >= interval:
        yield (
            f"{path} ends at {run.logged:,} images, the newest checkpoint is of {run.saved:,}, and a line is written "
            f"every {interval:,}: the end is missing.\nIts figures are lost; training can go on."
        )


def check_end(run: RunRecord) -> Iterator[str]:
    reason = run.lines[-1].get("stopped") if run.lines else None
    if run.running or run.finished or (run.total is None and run.newest and not reason):
        return
    of_all = f" of {run.total:,}" if run.total else ""
    lost = f", {run.seen - run.saved:,} of them after what is saved" if run.seen > run.saved else ""
    goes = f"goes on from {run.saved:,}" if run.saved else "begins anew, since nothing is saved"
    end = ", to the same end unless that is changed" if reason else ""
    told = f": {reason}" if reason else ""
    refused = any(itertools.chain.from_iterable(check(run) for check in (check_encoder, check_autoencoder, check_data)))
    then = "Once the following is put right, the same command" if refused else "The same command"
    yield f"it ended after {run.seen:,}{of_all} images{lost}{told}\n{then} {goes}{end}."


def check_disk(run: RunRecord) -> Iterator[str]:
    if not run.newest or run.finished:
        return
    needed = sum(file.stat().st_size for file in run.newest.rglob("*") if file.is_file())
    free = shutil.disk_usage(run.folder).free
    if free < 1.2 * needed:
        yield (
            f"{decimal(free)} are free on the disk; a checkpoint takes {decimal(needed)}, and is written before an "
            "older one is removed.\nMake room."
        )


def check_autoencoder(run: RunRecord) -> Iterator[str]:
    """Looks where `rae sample` does; before the first checkpoint what training would fetch is not missing."""
    if not isinstance(run.recipe, DiTRecipe):
        return
    name, trained = run.recipe.rae, run.state["identity"]["latents"] if run.state else None
    if is_baseline(name):  # pixels need nothing; of SD-VAE, whether it is the same one is told by its weights alone
        if weights := name.partition(":")[2].rpartition("@")[0]:
            yield from _missing_sd_vae(run, weights)
        return
    others = []
    for place in places_of(name, run.folder):
        try:
            found = saved_latent_identity(place)
        except ValueError as error:
            others.append(f"{name} cannot be read: {error}")
            continue
        if trained in (found, None):
            return
        others.append(
            f"{name} is another one now: the model lives in latent space {trained[:12]}, {place} has {found[:12]}."
        )
    if run.state:
        if not others and is_downloaded(name):
            return
        why = others[0] if others else f"{name} is not here, nor was it downloaded from the hub."
        yield (
            f"its autoencoder {why}\n`rae sample {run.folder} --autoencoder FOLDER` takes it from elsewhere, and so "
            "does rae=FOLDER behind the training command. Only the decoder may be another one."
        )
    elif why := others[0] if others else _refused(name):
        yield (
            f"its autoencoder {why}\n`rae train-decoder` makes one; rae=FOLDER behind the training command takes it "
            "from elsewhere."
        )


def _missing_sd_vae(run: RunRecord, weights: str) -> Iterator[str]:
    name = run.recipe.rae
    if run.state is None:
        if why := _refused(weights):
            yield f"its autoencoder {why}\nrae=sd-vae:FOLDER@SIZE behind the training command takes it from elsewhere."
    elif not Path(weights).expanduser().is_dir() and not is_downloaded(weights):
        yield (
            f"its autoencoder {name} is not here, nor was it downloaded from the hub.\nStart from the folder it was "
            f"trained in, or give `rae sample {run.folder} --autoencoder sd-vae:FOLDER@SIZE`."
        )


def _refused(name: str) -> str | None:
    """Why training would not look for `name`; it fetches what the hub has."""
    try:
        source_of(name)
    except SourceError as error:
        return f"is not here: {error}"
    return None


def check_encoder(run: RunRecord) -> Iterator[str]:
    """Of stage 1; the hub and the wheel are asked when it is needed."""
    if not isinstance(run.recipe, DecoderRecipe):
        return
    if run.state is None:
        name = run.recipe.encoder.name
        if name not in ENCODERS and (why := _refused(name)):
            yield f"its encoder {why}\nencoder.name=FOLDER behind the training command names another."
        return
    config = read_json(RAEConfig, run.intact[-1] / "model/config.json")
    kind, _, source = config.encoder.source.partition(":")
    if kind == "folder" and not config.encoder_included and not Path(source).is_dir():
        yield (
            f"its encoder is not here: {source}.\nPut it there, or load the model with "
            "RAE.from_pretrained(folder, encoder=load_encoder(...)); encoder.name=FOLDER goes on training."
        )


def missing_data(run: RunRecord) -> Iterator[str]:
    """Of what training reads, what is not there any more; of the hub's nothing is asked."""
    data = run.recipe.data
    for key, source in (("data.source", data.source), ("data.held_out", data.held_out)):
        if isinstance(source, str) and (reason := _missing(source)):
            yield (
                f"{key} {source}: {reason}\nStart from the folder that the run was begun in, or give {key}=... behind "
                "the training command; that they are the same images is compared."
            )
    if isinstance(run.recipe, DiTRecipe) and run.recipe.latents not in ("online", "memory"):
        again = "`rae cache` writes it again, and latents=FOLDER takes it from elsewhere."
        try:
            found = open_cache(run.recipe.latents).config.identity
        except (CacheError, ConfigError) as error:
            yield f"latents {run.recipe.latents}: {error}\n{again}"
        else:
            begun = run.state["identity"].get("cache", found) if run.state else found
            if found != begun:
                yield f"latents {run.recipe.latents}: it is the cache {found[:12]} now, not {begun[:12]}.\n{again}"


def check_data(run: RunRecord) -> Iterator[str]:
    """A run that is finished needs none of it."""
    if not run.finished:
        yield from missing_data(run)


# --- figures ---------------------------------------------------------------------------------------------------------


def check_finite(run: RunRecord) -> Iterator[str]:
    for line in run.lines:
        wrong = [name for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
        if wrong:
            yield (
                f"{', '.join(wrong)}: not finite at {line['images']:,} images.\nGo back to a checkpoint before that, "
                "or begin anew with a lower optim.lr, a longer optim.warmup, optim.clip=1.0 or run.precision=fp32."
            )
            return


def check_warnings(run: RunRecord) -> Iterator[str]:
    """What training said of its settings; what it said of its course may be past, and is judged anew."""
    for line in run.lines:
        if "warning" in line and line["about"] not in ("loss", "ema", "adversary"):
            yield line["warning"]


def check_starts(run: RunRecord) -> Iterator[str]:
    """Terms of stage 1 whose start, in images, the newest intact checkpoint knows."""
    keys = flatten(run.recipe.model_dump())
    for key, start in run.state["starts"].items() if run.state and run.total else ():
        if start >= run.total:
            yield start_warning(key, keys[key], run.recipe.run.duration)


def check_loss(run: RunRecord) -> Iterator[str]:
    name = "l1" if isinstance(run.recipe, DecoderRecipe) else "loss"  # stage 1's loss changes when its terms begin
    parts = _fifths(run.values(name))
    if parts and parts[-1] > RISEN * min(parts):
        yield (
            f"{name} has risen: {parts[-1]:.4g} in the last fifth of the log, {min(parts):.4g} at its lowest.\nLower "
            "optim.lr, lengthen optim.warmup, or set optim.clip=1.0, in a new run or from a checkpoint before it rose."
        )
    gradients = _fifths(run.values("grad_norm"))
    if gradients and gradients[-1] > EXPLODED * median(run.values("grad_norm")):
        yield (
            f"the gradient's norm has grown to {gradients[-1]:.4g}, {median(run.values('grad_norm')):.4g} is usual in "
            "this run.\nLower optim.lr, or set optim.clip=1.0."
        )


def check_trivial(run: RunRecord) -> Iterator[str]:
    """Stage 2's training loss against the trivial predictor's; where the log has none, for standardised latents."""
    if isinstance(run.recipe, DiTRecipe) and run.judged and run.values("loss"):
        bound = (run.values("width_bound") or [0.0])[-1]
        trivial = (run.values("trivial_loss") or [mean_trivial_loss(_flow(run), torch.ones(1))])[-1]
        if message := trivial_warning(run.values("loss")[-1], trivial, step=run.step, bound=bound):
            yield message


def check_held_out(run: RunRecord) -> Iterator[str]:
    name, series, losses = run.best_by, run.series(run.best_by), run.series("loss")
    if len(series) < 3 or not losses:
        return
    (images, best), (_, last) = min(series, key=lambda place: place[1]), series[-1]
    if last <= (DISTANCE_ROSE if isinstance(run.recipe, DecoderRecipe) else LOSS_ROSE) * best:
        return
    then, now = ([loss for at, loss in losses if at <= images] or [losses[0][1]])[-1], losses[-1][1]
    what, remedy = "training goes wrong altogether", "Lower optim.lr"
    if now < then:
        what = "it learns its images by heart"
        remedy = "More or mirrored images (data.flip), a smaller network or a shorter run"
    kept = run.folder / "best"
    taken = f"; {kept} names the checkpoint that did best: {kept.read_text().strip()}" if kept.is_file() else ""
    yield (
        f"{name} was {best:.4g} at {images:,} images and is {last:.4g} now, while the training loss went from "
        f"{then:.4g} to {now:.4g}: {what}.\n{remedy}{taken}."
    )


def check_average(run: RunRecord) -> Iterator[str]:
    ema, batch = run.recipe.optim.ema, run.recipe.run.batch
    decays = ema if isinstance(ema, tuple) else (ema,)  # stage 2 may average in several ways; the first one is judged
    told = [ema_warning(decay, run.total // batch) for decay in decays] if run.total else []
    for line in [line for line in run.lines if "held_out_loss_online" in line][-1:] if run.judged else []:
        average, online = line["held_out_loss"], line["held_out_loss_online"]
        told.append(lag_warning(average, online, decay=decays[0], step=line["images"] // batch))
    yield from filter(None, told)


def check_speed(run: RunRecord) -> Iterator[str]:
    rates, last = run.values("images_per_second"), _fifths(run.values("images_per_second"))
    if last and last[-1] < SLOWED * median(rates):
        yield (
            f"training has slowed down to {last[-1]:,.4g} images/s from {median(rates):,.4g}.\nSee what else runs on "
            "the machine (OMP_NUM_THREADS=1 on a busy CPU), whether it is hot, and how fast images can be read."
        )


def check_images(run: RunRecord) -> Iterator[str]:
    broken = [line["broken"] for line in run.lines if "broken" in line]
    if broken:
        names = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
        yield (
            f"{len(broken)} images cannot be read: {names}. Others took their places, or held-out ones were left out.\n"
            "Restore them before a new run; this one goes on with the images that it began with."
        )


def check_game(run: RunRecord) -> Iterator[str]:
    """Stage 1's discriminator, once it has had time to learn."""
    lines = [line for line in run.lines if "d_accuracy" in line][-1:]
    if not lines or run.state is None:
        return
    start = run.state["starts"]["loss.adversarial.discriminator.start"]
    told = health(lines[0], run.recipe.loss.adversarial.limit)
    if told and lines[0]["images"] >= start + PATIENCE * run.recipe.run.batch:
        yield told


def findings(run: RunRecord) -> list[str]:
    """What is wrong with a run, and what to do; empty where nothing is."""
    checks = [check_recipe, check_version, check_checkpoints, check_pointers, check_log]
    if run.recipe and not run.missing_state:
        checks += [check_end, check_disk, check_encoder, check_autoencoder, check_data, check_warnings, check_starts]
        checks += [check_finite, check_loss, check_trivial, check_held_out, check_average, check_speed, check_images]
        checks += [check_game]
    return [finding for check in checks for finding in check(run)]


# ----------------------------------------------------------------------------------------------------------------------


def _flow(run: RunRecord) -> Flow:
    return Flow(**json.loads((run.intact[-1] / "model/config.json").read_text())["flow"])


def _missing(source: str) -> str | None:
    """Why there are no images at `source`; None where there is something, or where only the hub knows."""
    if source in PACKAGED or source.startswith(("hf:", "hf-stream:")):
        return None
    path = Path(source)
    try:
        if path.is_file() or find_data_files(source):
            return None
    except (ImageError, OSError) as error:
        return str(error)
    if not path.is_dir():
        return "there is no such folder."
    return None if any(path.iterdir()) else "the folder is empty."


def _fifths(values: list[float]) -> list[float]:
    """Medians of the five fifths of a series; none of a short one."""
    if len(values) < FEW:
        return []
    edges = [len(values) * i // 5 for i in range(6)]
    return [median(values[a:b]) for a, b in itertools.pairwise(edges)]
