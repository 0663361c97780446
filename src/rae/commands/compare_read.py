"""What `rae report` is given, read once: runs, samples, reconstructions, evaluations. Weights are not looked at.

recipe.yaml, log.jsonl, samples/*.png    a run of either stage
samples.json, 000000.png, ...            what `rae sample` made
figures.json, 000000.png, ...            what `rae reconstruct` made
evaluation.json                          what `rae evaluate` found; samples/ or reconstructions/ beside it
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import yaml

from rae.commands.pictures import picture_name
from rae.commands.reference import UNKNOWN
from rae.commands.sample_folder import PROTOCOL
from rae.commands.subject import FIGURES
from rae.evaluation.judge import KID_AS_DRAWN, Better, take_turns
from rae.evaluation.report import ReportError
from rae.training.run_folder import flatten, read_log

EVALUATION = "evaluation.json"
# of a protocol: what stands elsewhere, is too long, or is of the source rather than of how pictures were made
ELSEWHERE = {"images", "source_images", "rows", "mean", "unreadable", "labels", "class_names", "jobs"}
KNOWN = {
    "recipe.yaml": "a training run",
    PROTOCOL: "samples",
    FIGURES: "reconstructions",
    EVALUATION: "an evaluation",
}


@dataclass(frozen=True)
class RunFiles:
    """A run of either stage, at work or not.

    Attributes:
        recipe: its keys, dotted.
        lines: of the log, each a dictionary with `images` seen.
        doubts: what of the log cannot be read.
        sheets: pictures of held-out images or samples, oldest first.
    """

    stage: Literal[1, 2]
    recipe: dict[str, Any]
    lines: list[dict[str, Any]]
    doubts: list[str]
    sheets: list[Path]

    @property
    def seen(self) -> int:
        """Images seen by the last line of the log."""
        return self.lines[-1]["images"] if self.lines else 0

    @property
    def judges(self) -> dict[str, str]:
        """Term of stage 1's loss, or held_out => the network that judges it, as the log says last."""
        said = (item for line in self.lines for item in line.items())
        return {key.removeprefix("judge_"): value for key, value in said if key.startswith("judge_")}

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Images seen and values, of every line that has this figure."""
        found = [(line["images"], line[name]) for line in self.lines if name in line]
        return [images for images, _ in found], [value for _, value in found]


@dataclass(frozen=True)
class Pictures:
    """A folder of pictures, and how they were made.

    Attributes:
        protocol: what samples.json or figures.json says.
        files: number of an image => its PNG, of those that are there; none where they were packed.
    """

    folder: Path
    protocol: dict[str, Any]
    files: dict[int, Path]

    @property
    def rows(self) -> dict[int, dict[str, Any]]:
        """Number of an image => its row of figures.json."""
        return {_number(row): row for row in self.protocol["rows"]}


class Judged(pydantic.BaseModel):
    """A figure of an evaluation; its error is a standard error, which a bound takes the place of (`share_bound`).

    What the error is of is no part of the protocol, by which figures compare.
    """

    title: str | None = None
    value: float
    error: float | None
    bound: float | None = None  # which earlier versions do not know; they have an error of 0
    better: Better
    protocol: str
    error_of: str | None = None  # None: an earlier version, which says it in the protocol


class Missing(pydantic.BaseModel):
    """A figure that an evaluation leaves out, and why."""

    title: str
    why: str


class About(pydantic.BaseModel):
    """The images that were judged, or that they were compared with."""

    kind: str = "images"
    source: str
    images: int
    identity: str | None = None
    size: tuple[int, int] | None = None
    crop: str | None = None
    role: str = UNKNOWN
    protocol: dict[str, Any] = {}


class Evaluation(pydantic.BaseModel):
    """What a report needs of evaluation.json; it may say more."""

    format: Literal[1]
    subject: About
    reference: About
    extractors: dict[str, dict[str, Any]]
    figures: dict[str, Judged]
    left_out: dict[str, Missing] = {}
    flags: list[str]

    @pydantic.model_validator(mode="after")
    def _written_as_now(self) -> Self:
        """What earlier versions say of errors, out of their protocols."""
        labels = self.subject.protocol.get("labels", [])  # of samples alone
        turns = take_turns(labels[: self.subject.images])
        for name, figure in self.figures.items():
            if figure.error_of is not None:
                continue
            figure.protocol, *said = re.split("; (?=no error of pairs|classes in turn, )", figure.protocol)
            figure.error_of = "; ".join(said)
            if name.startswith("density/"):
                figure.better = "nearer to 1"
            # divided by class or not, the line is to one distance, and told apart by less than its error
            figure.protocol = figure.protocol.replace(" by digest and class", " by digest")
            # too low by several of its errors, for two images of a class met too seldom (docs/metrics.md)
            if name.startswith("kid/") and (turns or said):
                figure.protocol += KID_AS_DRAWN
        return self


@dataclass(frozen=True)
class Compared:
    """One folder of those that are compared.

    Attributes:
        name: the end of its path, as short as tells it from the others.
    """

    name: str
    folder: Path
    run: RunFiles | None = None
    samples: Pictures | None = None
    reconstructions: Pictures | None = None
    evaluation: Evaluation | None = None

    @property
    def kinds(self) -> list[str]:
        stages = {1: "stage 1, a decoder", 2: "stage 2, a diffusion transformer"}
        kinds = [f"run of {stages[self.run.stage]}"] if self.run else []
        return kinds + [kind for kind in ("evaluation", "samples", "reconstructions") if getattr(self, kind)]


def read_all(folders: Sequence[Path]) -> list[Compared]:
    """Read what is to be compared, in the order given.

    Raises:
        ReportError: a folder that does not exist, holds nothing of the kind, is given twice or is damaged.
    """
    paths = [folder.expanduser() for folder in folders]
    twice = [path for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if twice:
        raise ReportError(f"{twice[0]} is given twice; compare it with another one.")
    return [_read(name, path) for name, path in zip(short_names(paths), paths)]


def made_by(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """How pictures were made, by dotted keys, without what is long or said elsewhere; checksums are cut short."""
    flat = flatten({key: value for key, value in protocol.items() if key not in ELSEWHERE})
    return {key: value[:12] if re.fullmatch("[0-9a-f]{64}", str(value)) else value for key, value in flat.items()}


def short_names(paths: Sequence[Path]) -> list[str]:
    """Ends of the paths, each as short as tells it from the others."""
    parts = [path.resolve().parts for path in paths]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(own[-length:]).replace("//", "/"))
    return names


def _read(name: str, folder: Path) -> Compared:
    if folder.is_file():
        raise ReportError(f"{folder} is a file; give the folder that it is in: {folder.parent}.")
    if not folder.is_dir():
        raise ReportError(f"{folder}: there is no such folder; give what a command of rae had for --out.")
    found = Compared(
        name,
        folder,
        run=_read_run(folder) if (folder / "recipe.yaml").is_file() else None,
        samples=_read_pictures([folder, folder / "samples"], PROTOCOL),
        reconstructions=_read_pictures([folder, folder / "reconstructions"], FIGURES),
        evaluation=_read_evaluation(folder / EVALUATION) if (folder / EVALUATION).is_file() else None,
    )
    if not found.kinds:
        raise ReportError(f"{folder} is nothing that can be compared: {_why_not(folder)}")
    return found


def _why_not(folder: Path) -> str:
    if (folder / "reconstructions.json").is_file():
        return f"it has no {FIGURES} yet, `rae reconstruct` was interrupted. The same command goes on."
    above = next((path for path in folder.absolute().parents if (path / "recipe.yaml").is_file()), None)
    if above:
        return f"it lies in a run; give {above}."
    inside = sorted({path.parent.name for name in KNOWN for path in folder.glob(f"*/{name}")})
    if inside:
        return f"it holds {', '.join(inside[:5])}; give {'that one' if len(inside) == 1 else 'these'}: {folder}/*."
    wanted = ", ".join(f"{file} ({what})" for file, what in KNOWN.items())
    return f"it has none of {wanted}. Give what a command of rae had for --out."


def _read_run(folder: Path) -> RunFiles:
    path = folder / "recipe.yaml"
    try:
        recipe = dict(yaml.safe_load(path.read_bytes()))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ReportError(f"{path} cannot be read ({reason}); if you still have the recipe, put it there.") from error
    lines, unreadable, cut = read_log(folder)
    doubts = []
    if unreadable:
        numbers = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        doubts.append(f"log.jsonl: no figures can be read from line {numbers}")
    if cut:
        doubts.append("log.jsonl ends in half a line, as while it is written or after a process was killed")
    sheets = sorted((folder / "samples").glob("[0-9]*.png"))
    return RunFiles(2 if "network" in recipe else 1, flatten(recipe), lines, doubts, sheets)


def _read_pictures(folders: Sequence[Path], name: str) -> Pictures | None:
    folder = next((folder for folder in folders if (folder / name).is_file()), None)
    if folder is None:
        return None
    protocol = _json(folder / name)
    needed = ["images", "size"] + (["first_seed", "labels", "class_names"] if name == PROTOCOL else ["source", "rows"])
    if missing := [key for key in needed if key not in protocol]:
        raise ReportError(f"{folder / name} has no {', '.join(missing)}: another version of rae wrote it, or no rae.")
    made = range(protocol["images"]) if name == PROTOCOL else map(_number, protocol["rows"])
    return Pictures(folder, protocol, {i: file for i in made if (file := folder / picture_name(i)).is_file()})


def _number(row: dict[str, Any]) -> int:
    return int(row["file"].partition(".")[0])


def _read_evaluation(path: Path) -> Evaluation:
    try:
        return Evaluation.model_validate(_json(path))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ReportError(
            f"{path} does not fit: {where}: {first['msg']}. Run `rae evaluate` again with this version."
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ReportError(f"{path} is damaged ({error}); run the command again that made it.") from error
