"""The same images in a folder, a table and a shard are the same run, resumed or not, and the same to every command."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import decoder_recipe, dit_recipe

from rae import LatentStats
from rae.data.images import open_images
from rae.folders import sha256
from rae.training.decoder import train_decoder
from rae.training.dit import train_dit

CLASSES = ("0", "1", "2")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """Eleven images of 24 x 30 pixels in three classes, in the order of the classes."""
    root = tmp_path_factory.mktemp("sources")
    rows, labels = [], []
    with tarfile.open(root / "x.tar", "w") as tar:
        for i in range(11):
            label, file = i // 4, io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 256, (24, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "png")
            path = root / "folder" / CLASSES[label] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
            rows.append({"bytes": file.getvalue(), "path": None})
            labels.append(label)
            for ending, content in (("png", file.getvalue()), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{i:02}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    datasets.Dataset.from_dict({"image": rows, "label": labels}, features).save_to_disk(root / "table")
    return {"folder": str(root / "folder"), "table": str(root / "table"), "shard": str(root / "x.tar")}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RAE_CACHE", str(tmp_path / "cache"))


def weights(run: Path) -> dict[str, str]:
    folder = run / "checkpoints" / (run / "latest").read_text().strip()
    return {
        str(file.relative_to(folder)): sha256(file) for file in folder.rglob("*.safetensors") if "model" in str(file)
    }


def test_decoders_end_in_the_same_bits(runs, sources, tmp_path):
    def train(kind: str, *durations: str) -> dict[str, str]:
        for duration in durations:
            recipe = decoder_recipe(
                runs / "encoder",
                data__source=sources[kind],
                data__held_out=0.2,
                data__enlarge=False,
                data__crop="random",
                data__flip=True,
                run__duration=duration,
                run__save_every="3st",
            )
            train_decoder(recipe, tmp_path / kind)
        return weights(tmp_path / kind)

    whole = train("folder", "6st")
    assert whole
    assert train("table", "3st", "6st") == whole
    assert train("shard", "3st", "6st") == whole


def test_diffusion_models_know_the_classes(runs, sources, tmp_path):
    found = []
    for kind, source in sources.items():
        recipe = dit_recipe(runs / "decoder", data__source=source, data__held_out=0.2, run__duration="2st")
        train_dit(recipe, tmp_path / kind)
        found.append(weights(tmp_path / kind))
        (config,) = (tmp_path / kind).glob("checkpoints/*/model/config.json")
        assert json.loads(config.read_text())["class_names"] == list(CLASSES)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("kind", ["table", "shard"])
def test_commands_take_them(run, runs, sources, tmp_path, kind):
    run("reconstruct", runs / "decoder", sources[kind], "--out", tmp_path / "out", "--num", 2)
    rows = json.loads((tmp_path / "out/figures.json").read_text())["rows"]
    assert [row["image"] for row in rows] == open_images(sources[kind]).names[:2]
    found = []
    for source in (sources[kind], sources["folder"]):
        run("stats", runs / "encoder", source, "--image-size", "16", "--out", tmp_path / "stats.safetensors")
        found.append(LatentStats.load(tmp_path / "stats.safetensors"))
    assert torch.equal(found[0].mean, found[1].mean)
    assert torch.equal(found[0].m2, found[1].m2)


def test_figures_are_those_of_the_folder(run, encoder, sources, tmp_path):
    """Also of a table whose images are bytes by another name."""
    table = datasets.load_from_disk(sources["table"]).cast_column("image", datasets.Image(decode=False))
    plain = table.add_column("jpg", [row["bytes"] for row in table["image"]]).remove_columns("image")
    plain.to_parquet(tmp_path / "plain.parquet")
    for i in range(12):
        other = np.random.default_rng(99 + i).integers(0, 200, (24, 30, 3), dtype=np.uint8)
        (tmp_path / "other").mkdir(exist_ok=True)
        Image.fromarray(other).save(tmp_path / f"other/{i}.png")
    found = []
    for kind, source in (sources | {"plain": tmp_path / "plain.parquet"}).items():
        look = ["--features", encoder, "--input-size", 16, "--out", tmp_path / kind]
        run("evaluate", source, *look, "--reference", tmp_path / "other")
        figures = json.loads((tmp_path / kind / "evaluation.json").read_text())["figures"]
        found.append({name: figure["value"] for name, figure in figures.items()})
    assert len(found) == 4
    for figures in found:
        assert figures == pytest.approx(found[0], rel=1e-6)
