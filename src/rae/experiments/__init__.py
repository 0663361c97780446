"""`rae experiment`: the paper's claims shown again in small, each by a study that is declared before it runs.

    frame.py    what a study is: a question, a claim, a protocol, a rule
    runner.py   runs what is missing of it, in rows that a killed run does not lose
    page.py     rows => a table, figures, a verdict
    command.py  what `rae experiment` does
    drawing.py  a picture of what the models make, as a file that says what it was made of

Every other file is one study, `STUDY`, a part of it, or what several of them share.
"""

import difflib
import importlib

NAMES = (
    "theorem",
    "overfit",
    "ingredients",
    "noise",
    "head",
    "spaces",
    "representation",
    "upsampling",
    "guidance",
    "labels",
    "unconditional",
)


def find_study(name: str):
    """The study of that name; ValueError names the nearest."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(NAMES)}."
        raise ValueError(f"no study {name!r}; {hint}")
    return importlib.import_module(f"rae.experiments.{name}").STUDY
