"""One thread for everything, and tiny trained runs of both stages, made by the commands once for all tests."""

import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from tiny import decoder_recipe, dit_recipe, save_encoder

from rae.cli import rae
from rae.training.decoder import train_decoder

# The tests' tensors are so small that threads cost more than they give; and a sum over two threads has other rounding
# errors than over one, so runs that are to end in the same bits need the same number, child processes included.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Shells start background jobs with Ctrl-C ignored, which children inherit; the tests are about what it does.
signal.signal(signal.SIGINT, signal.default_int_handler)

LENGTH = {"run__duration": "6st", "run__save_every": "3st", "run__evaluate_every": "100%"}


def invoke(*arguments) -> Result:
    """`rae ARGUMENTS`, in this process."""
    return CliRunner().invoke(rae, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def run():
    """`rae ARGUMENTS`, which must succeed: its output."""

    def run(*arguments) -> str:
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
        return result.output

    return run


@pytest.fixture(scope="session")
def refused():
    """`rae ARGUMENTS`, which must be refused in one message without a traceback: that message."""

    def refused(*arguments) -> str:
        result = invoke(*arguments)
        assert (result.exit_code, "Traceback" in result.output) == (2, False), result.output
        return result.output

    return refused


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """The tiny encoder of `save_encoder`; not to be written to."""
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def finished(encoder, tmp_path_factory) -> Path:
    """A run of stage 1, 12 steps with a checkpoint after each; not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "decoder"
    return train_decoder(decoder_recipe(encoder, run__save_every="1st", run__keep=99), folder)


@pytest.fixture(scope="session")
def runs(tmp_path_factory, run) -> Path:
    """encoder/, decoder.yaml, decoder/, dit.yaml and dit/: two checkpoints in each run; not to be written to."""
    root = tmp_path_factory.mktemp("runs")
    encoder = save_encoder(root / "encoder")
    (root / "decoder.yaml").write_text(yaml.safe_dump(decoder_recipe(encoder, **LENGTH).model_dump(mode="json")))
    run("train-decoder", root / "decoder.yaml", "--out", root / "decoder")
    (root / "dit.yaml").write_text(yaml.safe_dump(dit_recipe(root / "decoder", **LENGTH).model_dump(mode="json")))
    run("train-dit", root / "dit.yaml", "--out", root / "dit")
    return root
