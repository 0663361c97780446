"""`rae flops`: what a recipe's networks cost, and what training them would: hours, memory, money.

recipe --open_subject--> shapes --dit_phases, decoder_phases--> operations --a rate--> hours

Operations and parameters are counted. Hours are an estimate by a rate, either a stated share of a data sheet's peak or
what this machine was measured at; each says which. Memory is the account of docs/recipes.md and docs/stage2-recipes.md.
"""

import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from rae.autoencoder.decoder import Decoder
from rae.commands.cost_devices import DEVICES, Device, Precision, describe_machine, find_device, measure, this_machine
from rae.commands.cost_subject import Subject, open_subject
from rae.commands.cost_training import (
    Length,
    Phase,
    decoder_memory,
    decoder_phases,
    dit_memory,
    dit_phases,
    length,
)
from rae.config import ConfigError
from rae.diffusion.dit import build
from rae.evaluation import flops
from rae.evaluation.flops import Cost, published, total
from rae.training.decoder import DecoderRecipe
from rae.training.run import DTYPES

GIB = 2**30
SHARE = 0.35  # of a data sheet's peak: about the 350 TFLOP/s of an H100 that the recipes' headers assume
WHOLE, DEPTH = 10**8, 2  # a network of more parameters than that is measured by so many of its blocks
ROOM = 0.95  # of a device's memory; the rest is for what the allocator cannot use
LEFT_OUT = "reading images, encoding what is kept, the optimiser, evaluation, checkpoints, talk between devices"


def print_cost(
    names: Sequence[str],
    *,
    device: str | None = None,
    devices: int = 1,
    share: float | None = None,
    price: float | None = None,
    images: int | None = None,
    classes: int | None = None,
    as_json: bool = False,
) -> None:
    """`rae flops`: print, or with `as_json` write to standard output as one list, what each recipe costs.

    Args:
        names: recipes, runs or saved models; and KEY=VALUE, which change all the recipes. What is there by its very
            name is no KEY=VALUE, whatever characters are in it.
        device: a row of `DEVICES`, "here", or None: no hours.
        devices: how many of it share a step.
        share: of the data sheet's peak; None = `SHARE`.
        price: of one device for an hour.
        images, classes: of the training images; see `open_subject`.

    Raises:
        ConfigError: see `open_subject`; an unknown device; options that do not go together.
        SourceError: an encoder whose shape cannot be told.
    """
    recipes = [name for name in names if "=" not in name or Path(name).expanduser().exists()]
    overrides = [name for name in names if name not in recipes]
    if not recipes:
        raise ConfigError(f"{' '.join(overrides)} changes a recipe; name one in front of it.")
    if device is None and (price is not None or share is not None or devices > 1):
        raise ConfigError(f"--price, --share and --devices are of a device; add --device {' | '.join(DEVICES)} | here.")
    sheet = find_device(device) if device else None
    if share is not None and not sheet:
        raise ConfigError("--share is of a data sheet's peak; this machine is measured. Leave it out.")
    reports = []
    for name in recipes:
        subject = open_subject(name, overrides, images, classes)
        told = report(subject, devices)
        if device and not subject.recipe:
            raise ConfigError(f"--device: {name} is a saved model, which tells nothing of training; give its recipe.")
        if device:
            told["estimate"] = estimate(subject, told, sheet, devices, SHARE if share is None else share, price)
        reports.append(told)
        if not as_json:
            _print(told)
    if as_json:
        print(json.dumps(reports, indent=1))


def print_published() -> None:
    """`rae flops --published`: the paper's figures beside ours, and by which convention."""
    table = Table("arXiv 2510.11690", "what", "printed", "counted here", "counted how")
    for row in published():
        same = {True: "", False: "[yellow]"}[row.printed in (row.counted, "similar GFLOPs", "not at hand")]
        table.add_row(row.where, row.what, row.printed, f"{same}{row.counted}", row.by)
    Console().print(table)


# --- what is counted -------------------------------------------------------------------------------------------------


def report(subject: Subject, devices: int = 1) -> dict[str, Any]:
    """All that follows from the shapes, as JSON has it: operations, bytes, images; no prefixes."""
    told: dict[str, Any] = {"name": subject.name, "notes": list(subject.notes)}
    told["networks"] = {name: _cost(cost) for name, cost in subject.parts.items()}
    if not (recipe := subject.recipe):
        return told
    size, phases = plan(subject, devices)
    work = sum(phase.images * sum(part.flops for part in phase.work) for phase in phases)
    told["training"] = {
        "images": size.total,
        "batch": size.batch,
        "steps": size.total // size.batch,
        "flops": work,
        "phases": [phase._asdict() | {"work": [part._asdict() for part in phase.work]} for phase in phases],
    }
    told["memory"] = {"micro_batch": size.micro, "recompute": recipe.run.recompute, "bytes": memory(subject, size)}
    if subject.model:
        told["latents"] = latent_bytes(subject)
    return told


def _cost(cost: Cost) -> dict[str, int]:
    counts = {"parameters": cost.parameters, "linear": cost.linear, "attention": cost.attention}
    return counts | {"flops": cost.flops, "as_in_table_1b": cost.counted}


def plan(subject: Subject, devices: int) -> tuple[Length, list[Phase]]:
    recipe = subject.recipe
    size = length(recipe.run, subject.images, devices)
    if isinstance(recipe, DecoderRecipe):
        return size, decoder_phases(recipe, subject.parts, size, subject.images)
    return size, dit_phases(recipe, subject.parts, size)


def memory(
    subject: Subject, size: Length, *, micro: int | None = None, recompute: bool | None = None
) -> dict[str, int]:
    """What => bytes on each device, with `micro` images at a time; None = as the recipe says."""
    recipe, micro = subject.recipe, micro or size.micro
    recompute = recipe.run.recompute if recompute is None else recompute
    if isinstance(recipe, DecoderRecipe):
        found = decoder_memory(recipe, subject.space.decoder, subject.parts, size, micro=micro, recompute=recompute)
    else:
        found = dit_memory(recipe, subject.model.network, subject.parts, size, micro=micro, recompute=recompute)
    return {what: round(count) for what, count in found.items()}


def latent_bytes(subject: Subject) -> dict[str, int]:
    """Of a latent cache of the training images by type: the numbers, an int8 latent's scales, the label."""
    (channels, height, width), views = subject.space.latent_shape, 1 + subject.recipe.data.flip
    numbers = channels * height * width
    sizes = {"fp32": 4 * numbers, "fp16": 2 * numbers, "int8": numbers + 4 * channels}
    return {dtype: (8 + views * size) * subject.images for dtype, size in sizes.items()}


# --- what is estimated -----------------------------------------------------------------------------------------------


def estimate(
    subject: Subject, told: dict[str, Any], sheet: Device | None, devices: int, share: float, price: float | None
) -> dict[str, Any]:
    """Hours, images per second, whether it fits, money; and what that rests on.

    Args:
        subject, told: what is counted, and what `report` said of it.
        sheet: of the device; None = this machine, measured.
        devices, share, price: see `print_cost`.
    """
    size, phases = plan(subject, devices)
    precisions = {part.precision for phase in phases for part in phase.work}
    if sheet:
        on, room = sheet.name, sheet.memory * GIB
        rates: dict[Precision, float] = {precision: share * sheet.peak(precision) for precision in precisions}
        basis = f"assumed: {share:.0%} of the peaks in the {sheet.sheet}"
    else:
        machine = this_machine()
        on, (rates, basis) = describe_machine(machine), _measured(subject, precisions, machine, size.micro)
        room = torch.cuda.mem_get_info(machine)[1] if machine.type == "cuda" else _physical_memory()
    seconds = [sum(part.flops / rates[part.precision] for part in phase.work) for phase in phases]
    hours = sum(phase.images * each for phase, each in zip(phases, seconds)) / 3600 / devices
    found = {
        "device": on,
        "devices": devices,
        "basis": basis,
        "left_out": LEFT_OUT,
        "flops_per_second": rates,
        "images_per_second": [devices / each for each in seconds],
        "hours": hours,
        "device_hours": hours * devices,
        "memory": room,
        "usable": ROOM,
        "fits": sum(told["memory"]["bytes"].values()) <= ROOM * room,
        "largest_micro_batch": {
            f"run.recompute={str(recompute).lower()}": _largest(subject, size, ROOM * room, recompute)
            for recompute in (False, True)
        },
    }
    return found if price is None else found | {"price": price, "money": price * hours * devices}


def _largest(subject: Subject, size: Length, room: float, recompute: bool) -> int | None:
    """The largest of 1, 2, 4, ... images at a time, or all of a device's, that is within memory; None: none is."""
    sizes = [*(1 << power for power in range((size.local - 1).bit_length())), size.local]
    fits = [n for n in sizes if sum(memory(subject, size, micro=n, recompute=recompute).values()) <= room]
    return max(fits, default=None)


def _measured(
    subject: Subject, precisions: set[Precision], device: torch.device, most: int
) -> tuple[dict[Precision, float], str]:
    """Operations per second of this machine, by passes both ways through the network that is trained."""
    recipe = subject.recipe
    if isinstance(recipe, DecoderRecipe):
        config, make, count = subject.space.decoder, Decoder, flops.decoder
        shapes = [(math.prod(config.grid), config.latent_channels)]
    else:
        config, make, count = subject.model.network, build, lambda dit: total(flops.dit(dit).values())
        shapes = [(config.in_channels, *config.grid), ()]
    through = "the whole of it"
    if count(config).parameters > WHOLE and config.depth > DEPTH:
        through = f"{DEPTH} of its {config.depth} blocks"
        config = config.model_copy(update={"depth": DEPTH})
    network = make(config)
    network.to(device)

    def both_ways(images: int, dtype: torch.dtype) -> None:
        inputs = [torch.rand(images, *shape, device=device) for shape in shapes]
        labels = [torch.zeros(images, dtype=torch.int64, device=device)] * (len(shapes) - 1)
        output = network(*inputs, *labels, dtype=dtype, recompute=recipe.run.recompute)
        output.square().mean().backward()

    rates, said = {}, []
    for precision in sorted({"fp32" if precision == "tf32" else precision for precision in precisions}):
        images, seconds = measure(functools.partial(both_ways, dtype=DTYPES[precision]), device, most=most)
        rates[precision] = (3 + recipe.run.recompute) * count(config).flops * images / seconds
        said.append(
            f"{_prefixed(rates[precision], 'FLOP/s')} in {precision}, {images} image{'s' * (images > 1)} at a time"
        )
    if "tf32" in precisions:
        rates["tf32"] = rates["fp32"]
    return rates, f"measured: {'; '.join(said)}, both ways through {through}; assumed: all else at the same rate"


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- tables ----------------------------------------------------------------------------------------------------------


def _print(told: dict[str, Any]) -> None:
    console = Console()
    console.rule(escape(told["name"]), align="left")
    for note in told["notes"]:
        console.print(f"[yellow]{escape(note)}", highlight=False, soft_wrap=True)
    table = _table("counted, one image forwards", "parameters", "GMAC linear", "GMAC attention", "GFLOP", "as Table 1b")
    for name, cost in told["networks"].items():
        figures = [_giga(cost[key]) for key in ("linear", "attention", "flops", "as_in_table_1b")]
        table.add_row(name, f"{cost['parameters']:,}", *figures)
    console.print(table)
    if "training" in told:
        console.print(_training_table(told), _memory_table(told))
    if "estimate" in told:
        console.print(_estimate_table(told))


def _training_table(told: dict[str, Any]) -> Table:
    training = told["training"]
    table = _table("counted, training, one image", "in", "GFLOP")
    for phase in training["phases"]:
        table.add_row(f"[bold]{phase['name']}[/], {phase['images']:,} images")
        for part in phase["work"]:
            table.add_row(f"  {part['name']}", part["precision"], _giga(part["flops"]))
        together = _giga(sum(part["flops"] for part in phase["work"]))
        table.add_row("  together", "", together, end_section=True)
    steps = f"{training['steps']:,} steps of {training['batch']:,}"
    table.add_row(f"[bold]all {training['images']:,}[/], {steps}", "", _prefixed(training["flops"], "FLOP"))
    return table


def _memory_table(told: dict[str, Any]) -> Table:
    found = told["memory"]
    how = "blocks computed again" if found["recompute"] else "all activations kept"
    table = _table(f"by account, memory of a device, {found['micro_batch']} images at a time, {how}", "GiB")
    for name, size in found["bytes"].items():
        table.add_row(f"  {name}", f"{size / GIB:,.2f}")
    table.add_row("  together", f"{sum(found['bytes'].values()) / GIB:,.2f}", end_section=True)
    for dtype, size in told.get("latents", {}).items():
        table.add_row(f"[bold]latent cache[/], {dtype}, on the disk", decimal(size))
    return table


def _estimate_table(told: dict[str, Any]) -> Table:
    found = told["estimate"]
    table = Table(show_header=False)
    table.add_row("[bold]estimate[/] for", f"{found['devices']} x {escape(found['device'])}")
    table.add_row("by a rate", escape(found["basis"]))
    table.add_row("not in it", found["left_out"])
    for phase, rate in zip(told["training"]["phases"], found["images_per_second"]):
        table.add_row(phase["name"], f"{rate:,.4g} images/s")
    of_one = f", {found['device_hours']:,.3g} of one device" if found["devices"] > 1 else ""
    table.add_row("hours", f"[bold]{found['hours']:,.3g}[/]{of_one}")
    if "money" in found:
        table.add_row("money", f"{found['money']:,.0f}, at {found['price']:g} for an hour of one")
    verdict = "[green]enough" if found["fits"] else "[red]too little"
    share = f"{found['usable']:.0%} of {found['memory'] / GIB:,.0f} GiB"
    table.add_row("memory", f"{share}, which is assumed to be of use: {verdict}[/] by the account")
    for key, size in found["largest_micro_batch"].items():
        table.add_row(f"largest micro-batch, {key}", str(size or "none fits"))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table()
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _giga(count: float) -> str:
    return f"{count / 1e9:,.1f}" if count >= 1e10 else f"{count / 1e9:,.3g}"


def _prefixed(count: float, unit: str) -> str:
    """104e18 is 104 E."""
    power = max(0, min(7, (len(str(int(count))) - 1) // 3))
    return f"{count / 1000**power:.4g} {' KMGTPEZ'[power].strip()}{unit}"
