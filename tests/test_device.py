"""Runs on a device of its own: no step, figure, sheet or checkpoint takes tensors of two devices together."""

import functools
import sys

import pytest
import torch
from accelerate import Accelerator
from devices import NAME, Float32Device
from tiny import decoder_recipe, dit_recipe, lines, png

from rae import folders
from rae.training import checkpoint
from rae.training.decoder import train_decoder
from rae.training.dit import train_dit


@pytest.fixture
def elsewhere(monkeypatch):
    """Runs are at work on "lazy". What torch's C++ code does for its own devices alone goes by the CPU."""

    class Anywhere(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls)

    def new_tensor(self, data):
        return torch.tensor(data, dtype=self.dtype).to(self.device)

    def by_the_cpu(save, tensors, path):
        return save({name: tensor.cpu() for name, tensor in tensors.items()}, path)

    optimizer = sys.modules["torch.optim.optimizer"]  # which torch.optim has no attribute for
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch, "Generator", Anywhere)
    monkeypatch.setattr(torch.Tensor, "new_tensor", new_tensor)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: tolist(self.cpu()))
    for module in (checkpoint, folders):
        monkeypatch.setattr(module, "save_file", functools.partial(by_the_cpu, module.save_file))
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", NAME])
    monkeypatch.setattr(Accelerator, "device", torch.device(NAME))
    with Float32Device():
        yield


@pytest.mark.parametrize("latents", ["online", "memory"])
def test_stage_2_takes_nothing_of_two_devices_together(finished, tmp_path, elsewhere, latents):
    for i in range(8):
        (tmp_path / f"images/{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"images/{i % 2}/{i}.png").write_bytes(png(i))
    few = {"data__source": str(tmp_path / "images"), "data__held_out": 0.25, "latents": latents}
    recipe = functools.partial(dit_recipe, finished, **few, run__micro_batch=3, run__evaluate_every="2st")
    for steps in (2, 3):
        folder = train_dit(recipe(run__duration=f"{steps}st", run__log_every="1st"), tmp_path / "run")
        assert len(lines(folder)) == steps


def test_stage_1_takes_nothing_of_two_devices_together(encoder, tmp_path, elsewhere):
    recipe = functools.partial(decoder_recipe, encoder, run__micro_batch=3, run__evaluate_every="2st")
    for steps in (2, 3):
        length = {"run__duration": f"{steps}st", "run__log_every": "1st"}
        folder = train_decoder(recipe(**length, statistics=False), tmp_path / "run")
        assert len(lines(folder)) == steps
