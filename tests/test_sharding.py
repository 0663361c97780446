"""Two processes, alike or each with its part of the model, compute what one does; what they save is the same.

Started by pytest, this file starts itself in two processes, once for all tests: each checks the parts, then both train.
"""

import copy
import functools
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import decoder_recipe, dit_recipe, lines, save_encoder, tensors
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from rae import DiffusionModel
from rae.config import ConfigError, load_recipe, parse
from rae.diffusion.dit import DiT, DiTDHConfig, build
from rae.processes import accelerator
from rae.training.decoder import train_decoder
from rae.training.dit import train_dit
from rae.training.dit_recipe import DiTRecipe
from rae.training.optim import make_ema, update_ema
from rae.training.run import Run
from rae.training.sharding import compiled, is_sharded, part_for, shard, whole

# Five channels, odd widths and a whole batch of six leave no two processes with the same number of rows.
COMMON = {"network__qk_norm": True, "optim__ema": [0.9, 0.5], "optim__clip": 0.5, "run__batch": 6}
COMMON |= {"run__micro_batch": 2, "run__log_every": "1st", "run__duration": "4st", "run__keep_at": ["3st"]}
COMMON |= {"run__evaluate_every": "2st"}  # which must leave training as it is
SHARDED = {"run__sharding": "full", "run__recompute": True}


def test_what_spreads_models_is_imported_where_it_is_used():
    code = "import sys, rae.commands.cost; print('torch.distributed.fsdp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- in each of two processes ----------------------------------------------------------------------------------------


def small_network() -> DiT:
    settings = {"in_channels": 5, "grid": (3, 3), "width": 24, "heads": 2, "depth": 2, "num_classes": 2}
    torch.manual_seed(0)
    network = build(DiTDHConfig(**settings, head_width=40, head_heads=2, head_depth=1))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network


def check_parts(rank: int, mesh) -> None:
    """Parts of tensors become whole ones, whatever order they are in; no process has all rows."""
    network = small_network()
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    assert not is_sharded(network)
    shard(network, mesh)
    assert is_sharded(network)
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
    held = sum(parameter.to_local().numel() for parameter in network.parameters())
    assert 0.45 < held / sum(parameter.numel() for parameter in network.parameters()) < 0.55
    state = network.state_dict()
    state = dict(sorted(state.items(), reverse=rank == 1))  # each process in another order
    found = whole(state, keep=rank == 0)
    assert len(found) == (0 if rank else len(expected))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    for name, parameter in network.named_parameters():
        part = part_for(parameter, expected[name] + 1)
        assert torch.equal(part.to_local(), parameter.to_local() + 1)
        assert part.to_local().untyped_storage().nbytes() <= 4 * (expected[name].numel() + 1) // 2 + 4 * 120
    assert part_for(torch.zeros(3), found := torch.ones(3)) is found


def check_gradients(rank: int, mesh) -> None:
    """Gradients, averages and the gradient's norm are those of the whole batch in one process."""
    network = small_network()
    alone, average, average_alone = copy.deepcopy(network), make_ema(network), make_ema(network)
    shard(network, mesh)
    shard(average, mesh)
    draw = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, 8, 5, 3, 3, generator=draw)
    t, y = torch.rand(8, generator=draw), torch.randint(0, 3, (8,), generator=draw)
    (alone(x, t, y) - target).square().mean().backward()
    for part in torch.arange(4 * rank, 4 * rank + 4).split(3):  # micro-batches of 3 and 1
        loss = (network(x[part], t[part], y[part], recompute=True) - target[part]).square().flatten(1).mean(1)
        (loss.sum() / 4).backward()
    for (name, parameter), same in zip(network.named_parameters(), alone.parameters()):
        found = parameter.grad.full_tensor()
        torch.testing.assert_close(found, same.grad, rtol=1e-5, atol=1e-6 * float(same.grad.abs().max()), msg=name)
    norms = [torch.nn.utils.clip_grad_norm_(each.parameters(), 0.1) for each in (network, alone)]
    torch.testing.assert_close(norms[0].full_tensor(), norms[1], rtol=1e-6, atol=0)
    for each in (network, alone):
        torch.optim.SGD(each.parameters(), lr=1.0).step()
    update_ema(average, network, 0.7)
    update_ema(average_alone, alone, 0.7)
    expected = average_alone.state_dict()
    for name, value in whole(average.state_dict(), keep=True).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def check_compiled_blocks(mesh) -> None:
    """Every block is one graph, although it is recomputed, with the gradients of one that is not compiled."""
    network = small_network()
    alone = copy.deepcopy(network)
    shard(network, mesh)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # machine code takes most of a minute
    network = compiled(network)
    x, t, y = torch.ones(2, 5, 3, 3), torch.tensor([0.2, 0.7]), torch.tensor([0, 2])
    for each in (network, alone):
        each(x, t, y, recompute=True).square().mean().backward()
    for (name, parameter), same in zip(network.named_parameters(), alone.parameters()):
        found = parameter.grad.full_tensor()
        torch.testing.assert_close(found, same.grad, rtol=1e-5, atol=1e-6 * float(same.grad.abs().max()), msg=name)
    assert counters["stats"]["unique_graphs"] >= 2  # the trunk's block and the head's
    assert not counters["graph_break"]


def check_what_is_left(patch: pytest.MonkeyPatch) -> None:
    """Models are put together for checkpoints and `kept/` alone, not for figures, and are gone when the run ends."""
    models, put_together, conclude = [], DiffusionModel.of_weights, Run.conclude

    def remember(*arguments, **named) -> DiffusionModel:
        model = put_together(*arguments, **named)
        models.append(weakref.ref(model))
        return model

    def check(run: Run) -> Path:
        gc.collect()
        assert len(models) == (4 if run.main else 0)  # two averages, twice
        assert not any(model() for model in models)
        return conclude(run)

    patch.setattr(DiffusionModel, "of_weights", remember)
    patch.setattr(Run, "conclude", check)


def in_each_process(folder: Path) -> None:
    torch.set_num_threads(1)
    processes = accelerator()
    mesh = init_device_mesh("cpu", (processes.num_processes,))
    check_parts(processes.process_index, mesh)
    check_gradients(processes.process_index, mesh)
    check_compiled_blocks(mesh)
    for recipe in ("alike", "sharded", "began-alone"):
        with pytest.MonkeyPatch.context() as patch:
            if recipe == "sharded":
                check_what_is_left(patch)
            train_dit(load_recipe(DiTRecipe, folder / f"{recipe}.yaml"), folder / recipe)


# --- what they did ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """alone/, of one process; alike/ and sharded/, of two; began-alone/, of one to the middle and then of two."""
    root = tmp_path_factory.mktemp("processes")
    rae = train_decoder(decoder_recipe(save_encoder(root / "encoder")), root / "rae")
    recipes = {
        "alone": dit_recipe(rae, **COMMON),
        "alike": dit_recipe(rae, **COMMON),
        "sharded": dit_recipe(rae, **COMMON, **SHARDED | {"run__recompute": False}),
        "began-alone": dit_recipe(rae, **COMMON | {"run__recompute": True, "run__duration": "2st"}),
    }
    for name in ("alone", "began-alone"):
        train_dit(recipes[name], root / name)
    recipes["began-alone"] = dit_recipe(rae, **COMMON, **SHARDED)
    for name, recipe in recipes.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, root]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("name", ["alike", "sharded", "began-alone"])
def test_two_processes_compute_what_one_does(trained, name):
    # Noise belongs to the image, so two processes draw what one alone draws.
    for line, alone in zip(lines(trained / name), lines(trained / "alone"), strict=True):
        assert line["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
    found, expected = tensors(trained / name), tensors(trained / "alone")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)
    kept = (DiffusionModel.from_pretrained(trained / run / "kept/000000018") for run in (name, "alone"))
    for value, same in zip(*(model.network.parameters() for model in kept)):
        torch.testing.assert_close(value, same, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["alike", "sharded", "began-alone"])
def test_figures_and_sheets_of_two_processes_are_those_of_one(trained, name):
    for line, alone in zip(
        lines(trained / name, "held_out_loss"), lines(trained / "alone", "held_out_loss"), strict=True
    ):
        assert line == pytest.approx(alone, rel=1e-5)
    for file in ("samples/000000012.png", "samples/000000024.png"):
        sheet, same = (np.asarray(Image.open(trained / run / file), dtype=int) for run in (name, "alone"))
        assert abs(sheet - same).max() <= 1  # the nearest of 256 levels


def test_one_process_goes_on_from_what_two_with_parts_have_saved(trained):
    for name in ("sharded", "alone"):
        recipe = load_recipe(DiTRecipe, trained / f"{name}.yaml", ["run.duration=6st"])
        train_dit(recipe, trained / name)
    for line, alone in zip(lines(trained / "sharded"), lines(trained / "alone"), strict=True):
        assert line["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_one_process_alone_has_nothing_to_spread(trained, tmp_path, capsys):
    recipe = load_recipe(DiTRecipe, trained / "sharded.yaml", ["run.duration=1st", "run.keep_at=[]"])
    train_dit(recipe, tmp_path / "run")
    assert "run.sharding: full has no others to spread anything over: there is one process" in capsys.readouterr().err


def test_whole_matrices_and_parts_of_them_contradict_each_other(trained):
    recipe = yaml.safe_load((trained / "sharded.yaml").read_text())
    recipe["optim"]["name"] = "muon"
    with pytest.raises(ConfigError, match=r"muon computes with whole matrices.*take optim\.name=adamw, or run\.shard"):
        parse(DiTRecipe, recipe, "recipe")


if __name__ == "__main__":
    in_each_process(Path(sys.argv[1]))
