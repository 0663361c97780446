"""`rae convert`: files in the authors' layout become folders that load; what no file holds is asked for."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import png

from rae.autoencoder.latents import LatentStats
from rae.autoencoder.rae import RAE
from rae.diffusion.model import DiffusionModel
from rae.interop.convert import convert, detect
from rae.interop.official import ConversionError

GOLDEN = Path(__file__).parent / "golden"
QUIET = Console(file=io.StringIO())


@pytest.fixture
def encoder(tmp_path):
    """A folder with the encoder of a case: DINOv2 with registers, 32 wide, patches of 14."""
    case = GOLDEN / "encoder_dinov2_posinterp"
    folder = tmp_path / "encoder"
    folder.mkdir()
    hyper = json.loads((case / "case.json").read_text())["hyperparameters"]
    normalisation = {"image_mean": hyper["image_mean"], "image_std": hyper["image_std"]}
    (folder / "config.json").write_text(json.dumps(hyper["encoder_config"]))
    (folder / "preprocessor_config.json").write_text(json.dumps(normalisation))
    save_file(load_file(case / "weights.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def decoder_file(tmp_path):
    """model.pt of a decoder for 4 x 4 tokens of 32 channels."""
    weights = load_file(GOLDEN / "rae_decode" / "weights.safetensors")
    weights["decoder_embed.weight"] = weights["decoder_embed.weight"][:, :32].clone()
    torch.save(weights, tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.fixture
def stat_file(tmp_path):
    torch.save({"mean": torch.randn(32, 4, 4), "var": torch.rand(32, 4, 4)}, tmp_path / "stat.pt")
    return tmp_path / "stat.pt"


def convert_rae(path, out, encoder, statistics, **settings):
    settings = {"image_size": 64, "heads": 3} | settings
    return convert(path, out, encoder=str(encoder), statistics=statistics, console=QUIET, **settings)


def test_decoder_and_statistics_become_an_autoencoder(tmp_path, encoder, decoder_file, stat_file):
    converted = convert_rae(decoder_file, tmp_path / "out", encoder, stat_file)
    loaded = RAE.from_pretrained(tmp_path / "out")
    images = torch.rand(2, 3, 64, 64)
    assert loaded.latent_shape == (32, 4, 4)
    assert loaded.latent_identity == converted.latent_identity
    assert torch.equal(loaded.reconstruct(images), converted.reconstruct(images))
    assert torch.equal(loaded.latent_mean, torch.load(stat_file, weights_only=True)["mean"])


@pytest.fixture
def own_statistics(tmp_path, encoder, run):
    """What `rae stats` writes, of three images by the encoder of the decoder."""
    images, out = tmp_path / "images", tmp_path / "own.safetensors"
    images.mkdir()
    for seed in range(3):
        (images / f"{seed}.png").write_bytes(png(seed))
    run("stats", encoder, images, "--image-size", 64, "--enlarge", "--out", out)
    return out


def test_statistics_may_be_those_of_rae_stats(tmp_path, encoder, decoder_file, own_statistics):
    converted = convert_rae(decoder_file, tmp_path / "out", encoder, own_statistics)
    stats = LatentStats.load(own_statistics)
    assert torch.equal(converted.latent_mean, stats.mean.float())
    assert torch.equal(converted.latent_var, (stats.m2 / stats.count).float())
    assert RAE.from_pretrained(tmp_path / "out").latent_identity == converted.latent_identity
    with pytest.raises(ConversionError, match="latent statistics; give it as statistics="):
        convert(own_statistics, tmp_path / "other", console=QUIET)


def test_statistics_of_another_encoder_or_size_are_refused(tmp_path, encoder, decoder_file, own_statistics):
    with pytest.raises(ConversionError, match=r"image_size \(64, 64\), .* has \(128, 128\) here; take the same"):
        convert_rae(decoder_file, tmp_path / "out", encoder, own_statistics, image_size=128)
    weights = load_file(encoder / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, encoder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"holds statistics of the encoder .*, whose weights are not those of"):
        convert_rae(decoder_file, tmp_path / "out", encoder, own_statistics)
    assert not (tmp_path / "out").exists()


def test_a_training_checkpoint_must_have_the_encoder_that_is_named(tmp_path, encoder, decoder_file):
    frozen = load_file(encoder / "model.safetensors")
    decoder = torch.load(decoder_file, weights_only=True)

    def save(name, scale):
        state = {f"encoder.encoder.{k}": scale * v for k, v in frozen.items() if not k.startswith("layernorm.")}
        state |= {f"decoder.{k}": v for k, v in decoder.items()}
        torch.save({"model": state, "ema": state, "optimizer": {}}, tmp_path / name)
        return tmp_path / name

    path = save("ep-last.pt", 1)
    assert detect(path) == "autoencoder"
    convert_rae(path, tmp_path / "out", encoder, "none")
    assert RAE.from_pretrained(tmp_path / "out").latent_mean is None
    with pytest.raises(ConversionError, match="trained with another encoder"):
        convert_rae(save("other.pt", 2), tmp_path / "other", encoder, "none")


def test_stage2_is_bound_to_the_latents_it_belongs_to(tmp_path, encoder, decoder_file, stat_file):
    weights = load_file(GOLDEN / "ditdh_qknorm" / "weights.safetensors")
    torch.save({"model": weights, "ema": weights}, tmp_path / "stage2.pt")
    settings = {"shift": 2.0, "time_law": "uniform", "console": QUIET}
    convert(tmp_path / "stage2.pt", tmp_path / "dit", **settings)
    model = DiffusionModel.from_pretrained(tmp_path / "dit")
    assert (model.flow.shift, model.config.latent_identity) == (2.0, None)
    convert_rae(decoder_file, tmp_path / "rae", encoder, stat_file)
    with pytest.raises(ValueError, match=r"\(32, 4, 4\).*\(16, 4, 4\)"):
        convert(tmp_path / "stage2.pt", tmp_path / "bound", autoencoder=tmp_path / "rae", **settings)
    assert not (tmp_path / "bound").exists()


def test_classes_are_named_by_a_file(tmp_path, encoder, decoder_file, refused, run):
    weights = load_file(GOLDEN / "ditdh_qknorm" / "weights.safetensors")
    count = len(weights["y_embedder.embedding_table.weight"]) - 1
    torch.save(weights, tmp_path / "stage2.pt")
    names = ["tench, Tinca tinca", *(f"breed {i}" for i in range(1, count))]
    (tmp_path / "names.txt").write_text("\n".join(names))
    command = ["convert", tmp_path / "stage2.pt", "--shift", 1, "--time-law", "uniform"]
    output = run(*command, "--class-names", tmp_path / "names.txt", "--out", tmp_path / "named")
    assert f"{count}, 'tench, Tinca tinca' ..." in output
    model = DiffusionModel.from_pretrained(tmp_path / "named")
    assert model.config.class_names == tuple(names)
    assert model.label_indices(["tench, Tinca tinca", f"breed {count - 1}"]).tolist() == [0, count - 1]
    assert f"{count}, without names" in run(*command, "--out", tmp_path / "plain")
    (tmp_path / "names.json").write_text(json.dumps(names[1:]))
    message = refused(*command, "--class-names", tmp_path / "names.json", "--out", tmp_path / "few")
    assert f"names.json holds {count - 1} names, {tmp_path / 'stage2.pt'} has {count} classes" in message
    assert not (tmp_path / "few").exists()
    with pytest.raises(ConversionError, match="to which class_names does not apply"):
        convert_rae(decoder_file, tmp_path / "rae", encoder, "none", class_names=tmp_path / "names.txt")


@pytest.mark.parametrize(("shift", "warned"), [(1.0, False), (1.0005, False), (1.1, True), (6.928, True)])
def test_the_shift_of_the_latents_stands_beside_the_one_given(tmp_path, monkeypatch, shift, warned):
    monkeypatch.chdir(tmp_path)
    torch.save(load_file(GOLDEN / "ditdh_qknorm" / "weights.safetensors"), "[red].pt")
    console = Console(file=(page := io.StringIO()), width=120)
    convert("[red].pt", "out", shift=shift, time_law="uniform", weights="model", console=console)
    # 16 x 4 x 4 numbers, fewer than 4096
    assert f"{shift:.4f}, where sqrt(C h w / 4096), at least 1, is 1.0000" in page.getvalue()
    assert ("is not the one of these latents" in page.getvalue()) == warned
    assert "[red].pt => out" in page.getvalue()


def test_what_no_file_holds_is_asked_for_and_the_rest_refused(tmp_path, encoder, decoder_file, stat_file):
    out = tmp_path / "out"
    with pytest.raises(ConversionError, match="does not hold its encoder, image_size, statistics; give them"):
        convert(decoder_file, out, console=QUIET)
    with pytest.raises(ConversionError, match="to which shift does not apply"):
        convert_rae(decoder_file, out, encoder, stat_file, shift=2.0)
    with pytest.raises(ConversionError, match=r"\(8, 8\) tokens of images of \(128, 128\).*trained on \(4, 4\)"):
        convert_rae(decoder_file, out, encoder, "none", image_size=128)
    with pytest.raises(ConversionError, match="latent statistics; give it as statistics="):
        convert(stat_file, out, console=QUIET)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "resnet.pt")
    with pytest.raises(ConversionError, match="neither a decoder, an autoencoder nor a stage-2"):
        convert(tmp_path / "resnet.pt", out, console=QUIET)
    with pytest.raises(ConversionError, match="not an empty folder"):
        convert(decoder_file, tmp_path, console=QUIET)
    assert not out.exists()
