"""`rae doctor RUN`: facts of a run of either stage, its held-out loss by time, and what is wrong with it."""

from pathlib import Path
from statistics import median

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rae.commands.run_checks import findings, missing_data
from rae.commands.run_record import RunRecord, read_run
from rae.training.decoder import DecoderRecipe
from rae.training.dit_recipe import DiTRecipe
from rae.training.run_folder import size


def print_report(folder: Path) -> int:
    """Print facts, held-out loss by time and findings; returns how many findings there are.

    Raises:
        ValueError: the folder is not one of a run.
    """
    with Console(stderr=True).status(f"reading {escape(str(folder))}"):  # checkpoints are gigabytes to hash
        run = read_run(folder)
    console = Console()
    table = Table(show_header=False, title=Text(str(run.folder)))
    for name, value in facts(run).items():
        table.add_row(name, Text(value, overflow="fold"))
    console.print(table)
    if bins := by_time(run):
        table = Table("t", "held-out loss", "trivial", "of it", title="held-out loss by time: 0 is data, 1 is noise")
        for low, loss, trivial in bins:
            table.add_row(f"{low:.1f} to {low + 0.1:.1f}", f"{loss:.4g}", f"{trivial:.4g}", f"{loss / trivial:.0%}")
        console.print(table)
    found = findings(run)
    for number, finding in enumerate(found, start=1):
        what, *rest = finding.split("\n")
        console.print(Text(f"{number}. {what}", "yellow"), soft_wrap=True)
        for line in rest:
            console.print(Text(f"   {line}"), soft_wrap=True)
    notes = [note for note in (too_early(run), not_judged(run)) if note]
    if run.recipe and run.finished:
        notes += [f"To train longer: {missing}" for missing in missing_data(run)]
    for note in notes:
        console.print(Text(note, "yellow"), soft_wrap=True)
    if not found:
        console.print("Nothing else is wrong with it." if notes else "Nothing is wrong with it.", style="green")
    return len(found)


def too_early(run: RunRecord) -> str | None:
    """What to say of stage 2 before its losses are judged."""
    if not isinstance(run.recipe, DiTRecipe) or run.state is None or run.missing_state or run.judged:
        return None
    steps = run.total and run.total // run.recipe.run.batch
    never = f" It ends before that, at step {steps:,}." if steps and steps < run.judged_from else ""
    return (
        "It is too early to judge its losses: they tell whether anything is learnt from step "
        f"{run.judged_from:,} on, and {run.step:,} steps are made.{never}"
    )


def not_judged(run: RunRecord) -> str | None:
    """What to say of stage 2 where no images are kept back."""
    if not isinstance(run.recipe, DiTRecipe) or run.recipe.data.held_out:
        return None
    return "no held-out images: its loss by time is not known; data.held_out=0.1 in a new run keeps a tenth back."


def facts(run: RunRecord) -> dict[str, str]:
    """What there is, by name."""
    saved = {"checkpoints": run.damage, "kept": run.kept}
    rows = {
        name: ", ".join(f"{path.name} ({'damaged' if damage else size(path)})" for path, damage in found.items())
        for name, found in saved.items()
        if found
    }
    sheets = sorted((run.folder / "samples").glob("*.png"))
    rows |= {"samples": f"{len(sheets)}, the last one {sheets[-1]}" if sheets else "none"}
    if not run.recipe:
        return {"stage": "unknown, its recipe cannot be read"} | rows
    recipe, batch = run.recipe, run.recipe.run.batch
    state = "at work now" if run.running else "finished" if run.finished else "not finished"
    asked = f"{run.total // batch:,} steps of {batch} images" if run.total else f"batches of {batch} images"
    about = {
        "stage": _stage(recipe),
        "asked for": f"{recipe.run.duration}, {asked}",
        "made": f"{run.step:,} steps, {run.seen:,} images: {state}",
    }
    said = {f"{key[6:]}: {line[key]}": None for line in run.lines for key in line if key.startswith("judge_")}
    if said:
        about["judged by"] = "\n".join(said)
    if run.lines:
        about["last line of the log"] = f"{run.lines[-1].get('time', 'no time')}"
    if rates := run.values("images_per_second"):
        about["images/s"] = f"{median(rates):,.4g}"
    for name in ("loss", "grad_norm"):
        if values := run.values(name):
            about[name] = f"{values[0]:.4g} at first, {min(values):.4g} at its lowest, {values[-1]:.4g} now"
    for name in (run.best_by, "held_out_psnr"):
        if series := run.series(name):
            choose = max if name == "held_out_psnr" else min
            images, best = choose(series, key=lambda place: place[1])
            about[name] = f"{series[0][1]:.4g} at first, best {best:.4g} at {images:,} images, {series[-1][1]:.4g} now"
    if values := run.values("trivial_loss"):
        about["loss of a linear guess"] = f"{values[-1]:.4g}"
    if values := run.values("width_bound"):
        about["bound of Theorem 1"] = f"{values[-1]:.4g}"
    return about | rows


def by_time(run: RunRecord) -> list[tuple[float, float, float]]:
    """(lower edge, held-out loss, trivial loss) of the bins of t in the last line that has them."""
    line = next((line for line in reversed(run.lines) if "trivial_loss" in line), {})
    lows = [name.partition("/")[2] for name in line if name.startswith("held_out_loss/")]
    return [(float(low), line[f"held_out_loss/{low}"], line[f"trivial_loss/{low}"]) for low in lows]


def _stage(recipe: DecoderRecipe | DiTRecipe) -> str:
    if isinstance(recipe, DiTRecipe):
        network = f"{recipe.network.kind} {recipe.network.size}"
        return f"2: {network} in the latents of {recipe.rae}, images {recipe.data.source}"
    return f"1: decoder {recipe.decoder.size} for {recipe.encoder.name}, images {recipe.data.source}"
