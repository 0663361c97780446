"""Checkpoints: exact round trips, damage named, nothing half-written ever taken for whole."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rae.folders import find_folder
from rae.training import checkpoint
from rae.training.checkpoint import (
    CheckpointError,
    checkpoints,
    find_damage,
    keep_models,
    load_optimizers,
    load_weights,
    newest_checkpoint,
    optimizer_tensors,
    read_state,
    save_checkpoint,
    save_training_state,
)
from rae.training.optim import OptimConfig, build_optimizers, parameter_groups


class Net(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def make(name: str = "muon", width: int = 8, seed: int = 0):
    torch.manual_seed(seed)
    model = Net(width)
    return model, build_optimizers(OptimConfig(name=name, lr=0.01, ema=0.9), parameter_groups(model))


def train(model, optimizers, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def load(folder: Path, model, optimizers) -> None:
    load_weights(model, folder / "weights.safetensors")
    load_optimizers(optimizers, folder / "optimizer.safetensors")


def save(run: Path, images: int, model, optimizers, keep: int = 2) -> Path:
    def write(folder: Path) -> None:
        save_training_state(folder / "train", model.state_dict(), optimizer_tensors(optimizers), {"images": images})

    return save_checkpoint(run, images, write, keep=keep)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, name):
    model, optimizers = make(name)
    train(model, optimizers, 3)
    folder = save(tmp_path, 3, model, optimizers)
    train(model, optimizers, 4)
    resumed, resumed_optimizers = make(name, seed=1)
    load(folder / "train", resumed, resumed_optimizers)
    assert read_state(folder / "train") == {"images": 3}
    train(resumed, resumed_optimizers, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))


def test_newest_is_found_and_old_ones_go(tmp_path):
    model, optimizers = make()
    train(model, optimizers, 1)
    assert newest_checkpoint(tmp_path) is None
    for images in (900, 1000, 1100):
        save(tmp_path, images, model, optimizers)
    assert [path.name for path in checkpoints(tmp_path)] == ["000001000", "000001100"]
    assert (tmp_path / "latest").read_text() == "000001100\n"
    (tmp_path / "latest").unlink()  # killed between the rename and the pointer
    (tmp_path / "checkpoints/.tmp-000001200/train").mkdir(parents=True)  # killed while writing
    (tmp_path / "checkpoints/000001000-backup").mkdir()  # somebody's own, left alone
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints/000001100"
    assert (tmp_path / "latest").read_text() == "000001100\n"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    save(tmp_path, 1200, model, optimizers)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "000001000-backup",
        "000001100",
        "000001200",
    ]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "weights.safetensors is damaged: its sha256 is not the one written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "weights.safetensors is damaged: .* bytes instead of"),
        (lambda path: path.unlink(), "weights.safetensors is missing"),
    ],
)
def test_damage_is_named_and_never_passed_over(tmp_path, damage, message):
    model, optimizers = make()
    train(model, optimizers, 1)
    older, newer = (save(tmp_path, images, model, optimizers) for images in (1, 2))
    assert find_damage(newer) is None
    damage(newer / "train/weights.safetensors")
    with pytest.raises(CheckpointError, match=f"{message}[^$]*go on from 000000001, which is intact: rm -r {newer}"):
        newest_checkpoint(tmp_path)
    flip_a_bit(older / "train/optimizer.safetensors")
    with pytest.raises(CheckpointError, match="no older one is intact"):
        newest_checkpoint(tmp_path)


def test_full_disk_leaves_the_last_checkpoint(tmp_path):
    model, optimizers = make()
    train(model, optimizers, 1)
    good = save(tmp_path, 1, model, optimizers)

    def write(folder: Path) -> None:
        (folder / "model.safetensors").symlink_to("/dev/full")  # a device on which every write meets a full disk
        (folder / "model.safetensors").write_bytes(b"0" * 100_000)

    with pytest.raises(CheckpointError, match=rf"No space left on device.*last good checkpoint is {good}\. Make room"):
        save_checkpoint(tmp_path, 2, write, keep=1)
    assert newest_checkpoint(tmp_path) == good
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]


def test_state_of_another_model_or_optimizer_is_refused(tmp_path):
    model, optimizers = make("adamw")
    train(model, optimizers, 1)
    folder = save(tmp_path, 1, model, optimizers) / "train"
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load(folder, *make("adamw", width=12))
    with pytest.raises(CheckpointError, match=r"no optimiser state for momentum_buffer/blocks\.0\.weight"):
        load(folder, *make("muon"))
    tensors = load_file(folder / "optimizer.safetensors")
    save_file(tensors | {"exp_avg/extra": torch.zeros(1)}, folder / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match="unknown parameters: exp_avg/extra"):
        load(folder, *make("adamw"))
    save_file(tensors | {"exp_avg/head.weight": torch.zeros(1, 4)}, folder / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"exp_avg/head\.weight is \[1, 4\], the parameter \[1, 8\]"):
        load(folder, *make("adamw"))


def test_a_parameter_without_gradients_is_named(tmp_path):
    model, optimizers = make("adamw")
    model.extra = nn.Parameter(torch.zeros(1))
    optimizers = build_optimizers(OptimConfig(lr=0.01, ema=0.9), parameter_groups(model))
    train(model, optimizers, 1)
    with pytest.raises(CheckpointError, match="parameter extra has never received a gradient"):
        save(tmp_path, 1, model, optimizers)


def test_manifest_lists_every_file(tmp_path):
    model, optimizers = make()
    train(model, optimizers, 1)
    folder = save(tmp_path, 1, model, optimizers)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {"train/weights.safetensors", "train/optimizer.safetensors", "train/state.json"}


def test_kept_models_are_written_anew_and_never_removed(tmp_path):
    (tmp_path / "kept/.tmp-000000002").mkdir(parents=True)  # killed while writing
    assert newest_checkpoint(tmp_path) is None
    assert not list((tmp_path / "kept").iterdir())
    for content in ("first", "second"):  # killed before the checkpoint of that step, so the step was made again
        kept = keep_models(tmp_path, 2, lambda folder, text=content: (folder / "model").write_text(text))
    for images in (2, 3, 4):
        save_checkpoint(tmp_path, images, lambda folder: (folder / "model").mkdir(), keep=1)
    assert (kept / "model").read_text() == "second"
    assert find_damage(kept) is None
    assert [path.name for path in checkpoints(tmp_path)] == ["000000004"]
    with pytest.raises(CheckpointError, match=r"kept/000000005 could not be written.*last good checkpoint is .*04\. "):
        keep_models(tmp_path, 5, lambda folder: Path("/dev/full").write_bytes(b"0" * 100_000))
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["000000002"]


def test_best_checkpoint_stays_and_has_a_name(tmp_path):
    for images, best in ((1, False), (2, True), (3, False), (4, False)):
        save_checkpoint(tmp_path, images, lambda folder: (folder / "model").mkdir(), keep=1, best=best)
    assert [path.name for path in checkpoints(tmp_path)] == ["000000002", "000000004"]
    assert find_folder(tmp_path / "best", "a model") == tmp_path / "checkpoints/000000002/model"
    assert find_folder(tmp_path, "a model") == tmp_path / "checkpoints/000000004/model"


def test_a_kill_before_the_pointers_are_written_leaves_none_behind(tmp_path, monkeypatch):
    def write(folder: Path) -> None:
        (folder / "model").mkdir()

    def kill(run: Path, pointer: str, name: str) -> None:
        raise KeyboardInterrupt

    save_checkpoint(tmp_path, 1, write, keep=2, best=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_point", kill)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, write, keep=2, best=True)
    newest_checkpoint(tmp_path)
    assert [(tmp_path / pointer).read_text() for pointer in ("latest", "best")] == ["000000002\n"] * 2
    shutil.rmtree(tmp_path / "checkpoints/000000002")  # as the message about a damaged one says
    newest_checkpoint(tmp_path)
    assert (tmp_path / "best").read_text() == "000000001\n"
    save_checkpoint(tmp_path, 3, write, keep=2)
    newest_checkpoint(tmp_path)
    assert (tmp_path / "best").read_text() == "000000001\n"
