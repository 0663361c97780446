"""A run that is killed again and again ends in the same bits as one that was left alone: both stages, real SIGKILLs.

A child process trains; it is killed after a random time, or in the middle of writing a checkpoint, and the same command
is started again until it is done.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import adversarial, decoder_recipe, dit_recipe, lines, save_encoder, tensors

from rae.training.decoder import train_decoder
from rae.training.dit import train_dit

# Everything is imported once, then every attempt is a fork, killed for real. The sleeps make it easy to hit a step or
# a checkpoint in the making, and change nothing that is computed.
CHILD = """
import os, sys, time
import torch
torch.set_num_threads(1)
from transformers import Dinov2Model
from rae.config import load_recipe
from rae.data.images import open_images
from rae.training import adversarial, checkpoint, decoder, dit, run

def slow(function, seconds):
    return lambda *arguments, **named: (time.sleep(seconds), function(*arguments, **named))[1]

open_images("digits")
checkpoint.save_file, run.Run.finish_step = slow(checkpoint.save_file, 0.02), slow(run.Run.finish_step, 0.005)
adversarial.save_file = checkpoint.save_file
stage, recipe, folder = sys.argv[1:]
schema, train = {"1": (decoder.DecoderRecipe, decoder.train_decoder), "2": (dit.DiTRecipe, dit.train_dit)}[stage]
recipe = load_recipe(schema, recipe)
print("ready", flush=True)
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        train(recipe, folder)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run_with_kills(stage: int, recipe_file: Path, folder: Path, kills: int) -> tuple[int, int]:
    """Train to the end with up to `kills` SIGKILLs on the way; returns how many came, and how many of them left a
    half-written checkpoint."""
    command = [sys.executable, "-c", CHILD, str(stage), str(recipe_file), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    moments, came, halves = random.Random(stage), 0, 0
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as child:
        assert child.stdout.readline() == "ready\n", child.stderr.read()
        while True:
            child.stdin.write("\n")
            child.stdin.flush()
            process = int(child.stdout.readline())
            if came < kills:
                wait_for_a_moment(folder, moments, in_checkpoint=came % 2 == 0)
                with contextlib.suppress(ProcessLookupError):  # it was quicker
                    os.kill(process, signal.SIGKILL)
            status = int(child.stdout.readline())
            if status != -signal.SIGKILL:
                child.stdin.close()
                assert status == 0, child.stderr.read()
                return came, halves
            came += 1
            halves += any((folder / "checkpoints").glob(".tmp-*"))


def wait_for_a_moment(folder: Path, moments: random.Random, in_checkpoint: bool) -> None:
    """Until a checkpoint is being written, or, after the next one is there, some random time more."""
    seen = names(folder)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        now = names(folder)
        if in_checkpoint and any(name.startswith(".tmp-") for name in now - seen):
            time.sleep(moments.uniform(0, 0.02))
            return
        if not in_checkpoint and now - seen:
            time.sleep(moments.uniform(0.02, 0.2))
            return
        time.sleep(0.001)


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("*")}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, Path]:
    """Recipe files of both stages, and of the first one with a discriminator, in the folders of their unbroken runs."""
    root = tmp_path_factory.mktemp("runs")
    length = {"run__duration": "60st", "run__save_every": "5st", "run__log_every": "7st", "run__evaluate_every": "30st"}
    encoder = save_encoder(root / "encoder")
    train_decoder(decoder_recipe(encoder, **length), root / "decoder")
    # a discriminator after the first checkpoint, used after the second one
    game = adversarial(encoder, start="12st", discriminator={"start": "7st", "augment": 0.5})
    shorter = length | {"run__duration": "35st", "loss__adversarial": game}
    train_decoder(decoder_recipe(encoder, **shorter), root / "game")
    second = dit_recipe(root / "decoder", **length, optim__name="muon", run__micro_batch=3)
    train_dit(second, root / "dit")
    return {name: root / name for name in ("decoder", "game", "dit")}


@pytest.mark.parametrize(("stage", "name", "kills"), [(1, "decoder", 6), (1, "game", 4), (2, "dit", 6)])
def test_killed_run_ends_in_the_same_bits(stage, name, kills, recipes, tmp_path):
    unbroken = recipes[name]
    came, halves = run_with_kills(stage, unbroken / "recipe.yaml", tmp_path / "run", kills)
    assert came >= 3
    assert halves >= 1
    expected, found = tensors(unbroken), tensors(tmp_path / "run")
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different
    assert lines(tmp_path / "run", "images") == lines(unbroken, "images")  # every one once, with the same figures
    assert not list((tmp_path / "run/checkpoints").glob(".tmp-*"))
