"""Rows of a study => NAME.md and NAME.svg: our numbers with error bars beside the paper's, the verdict, its reason.

Rows of all studies => what docs/reproduction.md says of them.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rae.evaluation.report import Piece, code, folded, heading, markdown, note, paragraph, table
from rae.experiments.drawing import read_picture
from rae.experiments.frame import Difference, Results, Row, Study, Summary, Verdict
from rae.folders import aside

QUICK = "QUICK: a few steps of a few numbers, to show that the code runs. The figures mean nothing."


def write_page(study: Study, rows: Sequence[Row], out: Path) -> Path:
    """Write `out`/NAME.md and its figures NAME.svg, NAME-2.svg, ..., of the rows, and of NAME.png if it is there.

    Args:
        study: which one.
        rows: of one protocol, in any order.
        out: a folder that exists.
    """
    results = Results(rows)
    seeds = max([study.seeds, *(row["seed"] + 1 for row in rows)])
    missing = [f"{name}, seed {s}" for name in study.settings for s in range(seeds) if s not in results.seeds(name)]
    verdict = judge(study, results)
    head = [
        paragraph(f"Question: {study.question}"),
        paragraph(f"The paper: {study.claim}"),
        note(f"{verdict.says}: {verdict.reason}"),
    ]
    if any("quick" in row["config"] for row in rows):
        head.insert(0, note(QUICK))
    if missing:
        shown = "; ".join(missing[:8]) + (f"; and {len(missing) - 8} more" if len(missing) > 8 else "")
        head.append(note(f"{len(missing)} of {len(study.settings) * seeds} runs are missing: {shown}."))
    sections = {
        "": head,
        "Results": [*_results(study, results), *study.figures(results), *_picture(study, out)] if rows else [],
        "How it was decided": [paragraph(study.rule)],
        "How it was done": [*_protocol(study, rows), _cost(study, rows)] if rows else [],
    }
    number = itertools.count(1)

    def save(data: bytes, _: str) -> str:
        name = study.name + (f"-{k}" if (k := next(number)) > 1 else "") + ".svg"
        with aside(out / name) as file:
            file.write_bytes(data)
        return name

    text = markdown(f"Study: {study.name}", sections, save)
    with aside(out / f"{study.name}.md") as file:
        file.write_text(text)
    return out / f"{study.name}.md"


def overview(found: Sequence[tuple[Study, Sequence[Row]]]) -> str:
    """Markdown: all studies in a table, then each with its verdict and every figure beside the paper's own.

    Args:
        found: studies and their rows, none where one has not run; their pages lie in ../results.
    """
    lines, pieces = [], []
    for study, own in found:
        results = Results(own)
        verdict = judge(study, results)
        says = verdict.says if own else "not run"
        done = f"{len(own)} of {max(len(own), len(study.settings) * study.seeds)}"
        lines.append([study.name, study.question, says, done, study.cost, _spent(own) if own else "–"])
        pieces += [heading(f"{study.name}: {says}"), paragraph(study.question), paragraph(f"The paper: {study.claim}")]
        if own:
            link = f"[Figures, rule, protocol, cost](../results/{study.name}.md)"
            pieces += [note(f"{verdict.says}: {verdict.reason}"), _table(study, results)]
            pieces.append(Piece("", lambda _, link=link: link))
        pieces.append(code(f"rae experiment {study.name}"))
    top = table(["study", "question", "outcome", "runs", "cost of all its parts", "spent on these rows"], lines)
    return "\n\n".join(piece.markdown(lambda data, kind: "") for piece in [top, *pieces]) + "\n"


def judge(study: Study, results: Results) -> Verdict:
    """The study's own verdict, once every setting has a row; none of the quick form."""
    if any("quick" in row["config"] for row in results.rows):
        return Verdict("cannot tell", "this is the quick form.")
    if absent := [name for name in study.settings if not results.seeds(name)]:
        return Verdict("cannot tell", f"{len(absent)} of {len(study.settings)} settings have not been run.")
    return study.judge(results)


def _table(study: Study, results: Results) -> Piece:
    lines = []
    for name in study.settings:
        if results.seeds(name):
            paper = (study.paper or {}).get(name, {})
            lines.append([name, *(_cell(results[name, number], paper.get(number)) for number in study.shown)])
    return table(["setting", *study.shown.values()], lines)


def _results(study: Study, results: Results) -> list[Piece]:
    of_paper = " In small: the paper's own number." if study.paper else ""
    pieces = [
        _table(study, results),
        paragraph(f"Mean ± standard deviation over 3 seeds, or as many as brackets say.{of_paper}"),
    ]
    found = [(pair, results.difference(*pair)) for pair in study.pairs]
    if lines := [_difference(study, *pair, value) for pair, value in found if value]:
        pieces.append(paragraph("Differences, seed by seed, ± the standard error of their mean:"))
        pieces.append(table(["number", "difference", "value"], lines))
    return pieces


def _picture(study: Study, out: Path) -> list[Piece]:
    """The picture, where it has been drawn, with what it says of itself; or a note that it is none."""
    file = out / f"{study.name}.png"
    try:
        picture = read_picture(file) if study.drawing else None
    except ValueError as error:
        return [note(str(error))]
    if picture is None:
        return []
    link = Piece("", lambda _: f"![What the models make]({file.name})")
    return [link, paragraph(f"{picture.caption} Drawn at commit {picture.made_of['commit'] or 'unknown'}.")]


def _cell(value: Summary, paper: float | None) -> str:
    rounding = 1e-9 * max(1, abs(value.mean))
    mean = f"{value.mean:.4g}" if abs(value.mean) > rounding else "0"
    spread = "" if value.std is None or value.std < rounding else f" ± {value.std:.1g}"
    text = f"{mean}{spread}" + ("" if value.count == 3 else f" ({value.count})")
    return text if paper is None else f"{text}\npaper: {paper:g}"


def _difference(study: Study, number: str, a: str, b: str, value: Difference) -> list[str]:
    spread = "" if value.error is None else f" ± {value.error:.1g}"
    return [study.shown[number], f"{a} − {b}", f"{value.mean:+.4g}{spread} ({value.count} pairs)"]


def _protocol(study: Study, rows: Sequence[Row]) -> list[Piece]:
    """What all settings share, and what each has for itself."""
    found = {row["setting"]: row["config"] for row in rows}
    configs = {name: found[name] for name in study.settings if name in found}
    first, *others = configs.values()
    shared = [key for key in first if all(key in other and other[key] == first[key] for other in others)]
    own = list(dict.fromkeys(key for config in configs.values() for key in config if key not in shared))
    pieces = [table(["for all settings", ""], [[key, _value(first[key])] for key in shared])]
    if own:
        lines = [[name, *(_value(config.get(key, "–")) for key in own)] for name, config in configs.items()]
        pieces.append(folded("what each setting has for itself", table(["setting", *own], lines)))
    return pieces


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cost(study: Study, rows: Sequence[Row]) -> Piece:
    where = sorted({f"{row['hardware']}, {row['threads']} thread(s), torch {row['versions']['torch']}" for row in rows})
    commits = sorted({row["commit"] or "unknown" for row in rows})
    wall = sum(row["seconds"] for row in rows) / 60
    text = f"Cost: {len(rows)} runs, {_spent(rows)}, {wall:.1f} minutes by the clock"
    parts = f"Parts that the work folder held already are not in these; all of them: {study.cost}."
    return paragraph(f"{text}, on {'; '.join(where)}. {parts} Commits: {', '.join(commits)}.")


def _spent(rows: Sequence[Row]) -> str:
    return f"{sum(row['cpu_seconds'] for row in rows) / 60:.1f} minutes of processor time"
