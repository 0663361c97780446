"""The autoencoder: formulas of encode and decode, what its identity depends on, saving and loading bit for bit."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import rae.folders as rae_folders
from rae import RAE, Decoder, DecoderConfig, LatentStats, load_encoder
from rae.autoencoder.latents import map_to_tokens, tokens_to_map
from rae.autoencoder.rae import saved_latent_identity
from rae.config import ConfigError
from rae.sources import SourceError

NORMALISATION = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
CONFIG = DecoderConfig(latent_channels=16, width=24, depth=1, heads=2, mlp_width=32, patch_size=10, grid=(2, 3))


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


def make(network: Path, config: DecoderConfig = CONFIG, stats="given", **arguments) -> RAE:
    encoder = load_encoder(network, **{"image_size": (16, 24)} | NORMALISATION | arguments)
    torch.manual_seed(1)
    decoder = Decoder(config)
    if stats == "given":
        shape, generator = (16, *encoder.grid), torch.Generator().manual_seed(2)
        stats = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.1
    return RAE(encoder, decoder, stats)


@pytest.fixture
def rae(network) -> RAE:
    return make(network)


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(3))


def test_encode_is_the_standardised_tokens(rae):
    z = rae.encode(images())
    assert z.shape == (2, *rae.latent_shape) == (2, 16, 2, 3)
    expected = (tokens_to_map(rae.encoder(images()), (2, 3)) - rae.latent_mean) / (rae.latent_var + 1e-5).sqrt()
    assert torch.equal(z, expected)


def test_decode_is_the_decoder_of_the_tokens_in_the_encoders_colours(rae):
    tokens = rae.tokens(images())
    x = rae.decoder(tokens)
    expected = torch.stack([x[:, c] * NORMALISATION["std"][c] + NORMALISATION["mean"][c] for c in range(3)], dim=1)
    torch.testing.assert_close(rae.decode_tokens(tokens), expected)
    torch.testing.assert_close(rae.decode(rae.encode(images())), expected, rtol=1e-4, atol=1e-5)
    assert rae.output_size == (20, 30) == tuple(expected.shape[2:])


def test_standardisation_is_undone_exactly_in_float64(rae, monkeypatch):
    rae.latent_mean, rae.latent_var = rae.latent_mean.double(), rae.latent_var.double()
    tokens = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    monkeypatch.setattr(rae.encoder, "forward", lambda images, resize: tokens)
    seen = []
    monkeypatch.setattr(rae, "decode_tokens", lambda tokens, dtype: seen.append(tokens))
    rae.reconstruct(images())
    torch.testing.assert_close(seen[0], tokens, rtol=1e-14, atol=1e-14)


def test_exact_statistics_make_latents_of_mean_0_and_variance_1(network):
    x = images(64)
    raw = make(network, stats=None)
    stats = LatentStats(raw.latent_shape)
    for batch in x.split(10):
        stats.update(raw.encode(batch))
    z = RAE(raw.encoder, raw.decoder, stats).encode(x)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(raw.latent_shape), rtol=0, atol=1e-5)
    share = stats.var / (stats.var + 1e-5)
    torch.testing.assert_close(z.var(dim=0, correction=0), share.float(), rtol=1e-4, atol=1e-5)


def test_without_statistics_latents_are_the_tokens(network):
    rae = make(network, stats=None)
    assert torch.equal(map_to_tokens(rae.encode(images())), rae.tokens(images()))


def test_a_decoder_on_another_grid_resizes_the_tokens(network):
    rae = make(network, CONFIG.model_copy(update={"grid": (4, 6)}))
    assert rae.decode(rae.encode(images())).shape == (2, 3, 40, 60)


def test_modes_change_nothing(rae):
    assert torch.equal(rae.train().reconstruct(images()), rae.eval().reconstruct(images()))


def test_decoding_is_differentiable(rae):
    z = rae.encode(images()).requires_grad_()
    rae.decode(z)[0, 0, 0, 0].backward()
    assert z.grad[0].abs().max() > 0
    assert z.grad[1].abs().max() == 0


def test_identity_is_of_the_latent_space_and_not_of_the_decoder(network, rae):
    mean, var = rae.latent_mean, rae.latent_var
    other_decoder = RAE(rae.encoder, Decoder(CONFIG.model_copy(update={"depth": 2})), (mean, var))
    assert other_decoder.latent_identity == rae.latent_identity == make(network).latent_identity
    different = [
        RAE(rae.encoder, rae.decoder, (mean + 1e-6, var)),
        RAE(rae.encoder, rae.decoder, (mean, var), latent_eps=1e-6),
        RAE(rae.encoder, rae.decoder, None),
        make(network, image_size=(32, 48), input_size=(16, 24)),
        make(network, mean=(0.5, 0.5, 0.5), std=(0.2, 0.3, 0.4)),
    ]
    assert len({rae.latent_identity, *(other.latent_identity for other in different)}) == 6


@pytest.mark.parametrize("stats", ["given", None])
def test_identity_of_a_saved_autoencoder_is_read_without_weights(network, tmp_path, stats):
    rae = make(network, stats=stats)
    rae.save_pretrained(tmp_path)
    (tmp_path / "decoder.safetensors").unlink()
    assert saved_latent_identity(tmp_path) == rae.latent_identity
    if stats:
        save_file({"mean": rae.latent_mean, "var": rae.latent_var + 1}, tmp_path / "statistics.safetensors")
        with pytest.raises(ValueError, match=r"statistics\.safetensors is damaged or was changed"):
            saved_latent_identity(tmp_path)


@pytest.mark.parametrize("include_encoder", [False, True])
@pytest.mark.parametrize("stats", ["given", None])
def test_save_and_load_keep_every_bit(network, tmp_path, include_encoder, stats):
    rae = make(network, stats=stats)
    rae.save_pretrained(tmp_path / "saved", include_encoder=include_encoder)
    if include_encoder:  # the folder alone is enough
        moved = network.rename(network.with_name("elsewhere"))
        loaded = RAE.from_pretrained(tmp_path / "saved")
        moved.rename(network)
    else:
        loaded = RAE.from_pretrained(tmp_path / "saved")
    assert loaded.latent_identity == rae.latent_identity
    assert loaded.encoder.config == rae.encoder.config
    assert torch.equal(loaded.encode(images()), rae.encode(images()))
    assert torch.equal(loaded.reconstruct(images()), rae.reconstruct(images()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def test_saving_again_replaces_and_a_foreign_folder_is_left_alone(rae, tmp_path):
    rae.save_pretrained(tmp_path / "saved")
    rae.decoder.head.bias.data += 1
    rae.save_pretrained(tmp_path / "saved")
    assert torch.equal(RAE.from_pretrained(tmp_path / "saved").decoder.head.bias, rae.decoder.head.bias)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    (tmp_path / "saved" / "thesis.tex").touch()  # beside a model, but no part of it
    for folder in ("mine", "saved", "mine/notes.txt"):
        with pytest.raises(ValueError, match=r"is not a saved autoencoder alone \(it has (notes.txt|thesis.tex)\)"):
            rae.save_pretrained(tmp_path / folder)
    assert (tmp_path / "mine" / "notes.txt").exists()
    assert (tmp_path / "saved" / "thesis.tex").exists()


def test_a_failure_leaves_the_folder_as_it_was(rae, tmp_path, monkeypatch):
    saved = tmp_path / "saved"
    rae.save_pretrained(saved)
    content = {path.name: path.read_bytes() for path in saved.iterdir()}
    rae.decoder.head.bias.data += 1
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError("no")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="no"):
            rae.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == content
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    # what a killed process left behind is in nobody's way
    for name in (".saved.old", f".saved.{os.getpid()}", f".saved.{os.getpid()}.old"):
        (tmp_path / name / "old").mkdir(parents=True)
    rae.save_pretrained(saved)
    assert torch.equal(RAE.from_pretrained(saved).decoder.head.bias, rae.decoder.head.bias)


def test_every_file_is_on_the_disk_before_it_has_its_name(rae, tmp_path, monkeypatch):
    synced, fsync, rename = set(), rae_folders.fsync, Path.rename
    monkeypatch.setattr(rae_folders, "fsync", lambda path: (synced.add(path.name), fsync(path)))

    def check(path: Path, target: Path) -> Path:
        assert synced == {"config.json", "decoder.safetensors", "statistics.safetensors", "new"}
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", check)
    rae.save_pretrained(tmp_path / "saved")
    assert tmp_path.name in synced


def test_a_run_folder_stands_for_its_newest_checkpoint(rae, tmp_path):
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(ValueError, match="this run has saved nothing yet"):
        RAE.from_pretrained(tmp_path)
    rae.save_pretrained(tmp_path / "checkpoints" / "000000064" / "model")
    (tmp_path / "checkpoints" / ".tmp-000000128").mkdir()
    assert RAE.from_pretrained(tmp_path).latent_identity == rae.latent_identity  # killed before it had a pointer
    (tmp_path / "latest").write_text("000000064\n")
    assert RAE.from_pretrained(tmp_path).latent_identity == rae.latent_identity


def test_rounded_models_are_neither_saved_nor_loaded(network, tmp_path):
    saved = tmp_path / "saved"
    make(network).save_pretrained(saved)
    for change, message in (
        (lambda rae: rae.half(), r"decoder.safetensors cannot be saved: \w+ is torch.float16.*load the model again"),
        (lambda rae: setattr(rae, "latent_var", rae.latent_var.double()), "var is torch.float64"),
        (lambda rae: rae.bfloat16().float(), "latent_mean or latent_var have changed"),
    ):
        change(rae := make(network))
        with pytest.raises(ValueError, match=message):
            rae.save_pretrained(saved)
    weights = load_file(saved / "statistics.safetensors")
    save_file(weights | {"mean": weights["mean"].half()}, saved / "statistics.safetensors")
    config = json.loads((saved / "config.json").read_text())
    config["files"]["statistics.safetensors"] = rae_folders.sha256(saved / "statistics.safetensors")
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"statistics\.safetensors cannot be loaded: mean is torch\.float16"):
        RAE.from_pretrained(saved)


def test_another_encoder_is_refused(network, rae, tmp_path):
    rae.save_pretrained(tmp_path / "saved")
    other = tmp_path / "other"
    shutil.copytree(network, other)
    weights = load_file(other / "model.safetensors")
    weights["embeddings.cls_token"] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    encoder = load_encoder(other, image_size=(16, 24), **NORMALISATION)
    with pytest.raises(ValueError, match=f"SHA-256 {encoder.checksum()[:12]}.*made with {rae.encoder.checksum()[:12]}"):
        RAE.from_pretrained(tmp_path / "saved", encoder=encoder)
    encoder = load_encoder(network, image_size=(32, 48), input_size=(16, 24), **NORMALISATION)
    with pytest.raises(ValueError, match=r"image_size \(32, 48\), not \(16, 24\)"):
        RAE.from_pretrained(tmp_path / "saved", encoder=encoder)


def test_an_encoder_that_has_moved_can_be_passed(network, rae, tmp_path):
    rae.save_pretrained(tmp_path / "saved")
    moved = network.rename(network.with_name("moved"))
    try:
        with pytest.raises(SourceError, match="is gone"):
            RAE.from_pretrained(tmp_path / "saved")
        encoder = load_encoder(moved, image_size=(16, 24), **NORMALISATION)
        loaded = RAE.from_pretrained(tmp_path / "saved", encoder=encoder)
    finally:
        moved.rename(network)
    assert loaded.latent_identity == rae.latent_identity


def test_damaged_and_foreign_folders_are_named(rae, tmp_path):
    saved = tmp_path / "saved"
    rae.save_pretrained(saved)

    def attempt(error: type[Exception], message: str, change) -> None:
        folder = tmp_path / "changed"
        shutil.copytree(saved, folder)
        change(folder)
        with pytest.raises(error, match=message):
            RAE.from_pretrained(folder)
        shutil.rmtree(folder)

    def flip_a_byte(folder: Path) -> None:
        data = bytearray((folder / "decoder.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "decoder.safetensors").write_bytes(data)

    def cut(folder: Path) -> None:
        (folder / "decoder.safetensors").write_bytes((folder / "decoder.safetensors").read_bytes()[:-50])

    def edit(folder: Path, **changes) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    attempt(ValueError, "decoder.safetensors is damaged or was changed", flip_a_byte)
    attempt(ValueError, "decoder.safetensors is damaged or was changed", cut)
    attempt(ValueError, "statistics.safetensors is missing", lambda f: (f / "statistics.safetensors").unlink())
    attempt(ConfigError, "config.json is missing", lambda f: (f / "config.json").unlink())
    attempt(ConfigError, "not valid JSON", lambda f: (f / "config.json").write_text('{"kind": '))
    attempt(ConfigError, "latent_epz: unknown key; did you mean 'latent_eps'", lambda f: edit(f, latent_epz=1e-5))
    attempt(ConfigError, "kind", lambda f: edit(f, kind="ditdh"))
    deeper = CONFIG.model_copy(update={"depth": 2}).model_dump()
    attempt(ValueError, "does not fit its config.json", lambda f: edit(f, decoder=deeper))
    for pickle in ("decoder.pt", "model.pth", "pytorch_model.bin"):
        with pytest.raises(ValueError, match="`rae convert`"):
            RAE.from_pretrained(tmp_path / pickle)
    with pytest.raises(SourceError, match="nothing: no such folder"):
        RAE.from_pretrained(tmp_path / "nothing")


def test_parts_that_do_not_fit_are_refused(network, rae):
    with pytest.raises(ValueError, match=r"takes tokens of 12 channels, .* makes 16; set latent_channels=16"):
        make(network, CONFIG.model_copy(update={"latent_channels": 12}))
    with pytest.raises(ValueError, match=r"latent mean of shape \[16, 2, 2\] given for latents of \[16, 2, 3\]"):
        make(network, stats=(torch.zeros(16, 2, 2), torch.ones(16, 2, 2)))
    with pytest.raises(ValueError, match=r"latents of shape \[2, 16, 3, 2\] given"):
        rae.decode(torch.zeros(2, 16, 3, 2))
    with pytest.raises(ValueError, match="seen no latents"):
        make(network, stats=LatentStats((16, 2, 3)))
