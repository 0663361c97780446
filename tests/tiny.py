"""Tiny real parts for the tests: pictures, an encoder with random weights in the transformers layout, recipes, runs."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from rae.training.decoder import DecoderRecipe
from rae.training.dit_recipe import DiTRecipe


def picture(seed: int) -> np.ndarray:
    """Noise of 24 x 30 px, uint8 [H,W,3]."""
    return np.random.default_rng(seed).integers(0, 256, (24, 30, 3), dtype=np.uint8)


def png(seed: int) -> bytes:
    """The file of `picture(seed)`."""
    file = io.BytesIO()
    Image.fromarray(picture(seed)).save(file, "png")
    return file.getvalue()


def save_encoder(folder: Path, image_size: int = 16, patch_size: int = 8) -> Path:
    """A DINOv2 of width 16 with one layer and random weights: images of 2 x 2 tokens."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=image_size, patch_size=patch_size
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return folder


def decoder_recipe(encoder: Path, **changes) -> DecoderRecipe:
    return _change(
        DecoderRecipe(
            encoder={"name": str(encoder), "image_size": (16, 16)},
            decoder={"size": (16, 1, 2, 32), "patch_size": 8},
            data={"source": "digits", "held_out": 0.1, "enlarge": True},
            loss={"perceptual": {"kind": "encoder", "weight": 0.1}},
            optim={"lr": 1e-3, "ema": 0.9},
            run={"duration": "12st", "batch": 8, "log_every": "3st", "save_every": "4st", "evaluate_every": "6st"}
            | {"evaluate_images": 16},
        ),
        changes,
    )


def dit_recipe(rae: Path, **changes) -> DiTRecipe:
    return _change(
        DiTRecipe(
            rae=str(rae),
            data={"source": "digits", "held_out": 0.1, "enlarge": True, "flip": True},
            network={"kind": "dit-dh", "size": (16, 2, 1), "head": (16, 2, 1)},
            optim={"lr": 1e-3, "ema": 0.9},
            sheet={"images": 2, "steps": 3, "cfg": 1.5},
            run={"duration": "12st", "batch": 8, "log_every": "3st", "save_every": "4st", "evaluate_every": "6st"}
            | {"evaluate_images": 16},
        ),
        changes,
    )


def adversarial(encoder: Path, *, discriminator: dict | None = None, **changes) -> dict:
    """The section of a recipe, for a discriminator on the same small encoder; both players from the first step."""
    small = {"features": str(encoder), "input_size": 16, "depths": (0,), "kernel": 3, "start": "0st"}
    small["optim"] = {"lr": 1e-3, "final_lr": None, "schedule": "constant", "warmup": "0st"}
    return {"start": "0st", "discriminator": small | (discriminator or {})} | changes


def _change(recipe, changes: dict):
    """The recipe with dotted keys changed, as `section__key=value`."""
    data = recipe.model_dump()
    for key, value in changes.items():
        *parents, last = key.split("__")
        section = data
        for name in parents:
            section = section[name]
        section[last] = value
    return type(recipe).model_validate(data)


_TRAIN = """
import sys
from rae.config import load_recipe
from rae.processes import process_state
from rae.training.decoder import DecoderRecipe, train_decoder
from rae.training.dit import train_dit
from rae.training.dit_recipe import DiTRecipe

stage, processes, *runs = sys.argv[1:]
schema, train = {"1": (DecoderRecipe, train_decoder), "2": (DiTRecipe, train_dit)}[stage]
assert process_state().num_processes == int(processes), process_state()
for recipe, folder in zip(runs[::2], runs[1::2]):
    train(load_recipe(schema, recipe), folder)
"""


def train_all_in_processes(count: int, recipes: dict[Path, DecoderRecipe | DiTRecipe]) -> None:
    """Train recipes of one stage into their folders, one after another in the same processes."""
    for folder, recipe in recipes.items():
        folder.with_suffix(".yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    script = folder.with_suffix(".py")
    script.write_text(_TRAIN)
    runs = [path for folder in recipes for path in (folder.with_suffix(".yaml"), folder)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    stage = "1" if isinstance(recipe, DecoderRecipe) else "2"
    subprocess.run(
        [*launch, script, stage, str(count), *runs],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


# --- what a run left -------------------------------------------------------------------------------------------------


def log(folder: Path, figure: str) -> list[float]:
    """One figure, wherever it was logged."""
    return [line[figure] for line in _log(folder) if figure in line]


def lines(folder: Path, having: str = "loss") -> list[dict[str, float]]:
    """The lines of the log that have this figure ("images": all of them), without the clock."""
    found, clock = (line for line in _log(folder) if having in line), ("time", "images_per_second")
    return [{name: value for name, value in line.items() if name not in clock} for line in found]


def _log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint holds."""
    newest = folder / "checkpoints" / (folder / "latest").read_text().strip()
    found = {}
    for path in newest.rglob("*.safetensors"):
        found |= {f"{path.relative_to(newest)}:{name}": value for name, value in load_file(path).items()}
    return found


def same_bits(a: Path, b: Path) -> bool:
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
