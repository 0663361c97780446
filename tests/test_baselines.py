"""SD-VAE and pixels as latent spaces: the numbers of diffusers, the interface of an RAE, no weights by chance."""

import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tiny import dit_recipe, log

from rae import RAE, DiffusionModel, generate
from rae.autoencoder.baselines import SDVAE, Autoencoder, Pixels, is_baseline, open_autoencoder
from rae.data.images import to_bytes, to_unit
from rae.sources import SourceError, weights_sha256
from rae.training.dit import train_dit

WEIGHTS = "diffusion_pytorch_model.safetensors"
LONGER = {"run__duration": "60st", "run__log_every": "10st", "run__save_every": "50%", "run__evaluate_every": "100%"}


def make_vae(**changes) -> AutoencoderKL:
    """An SD-VAE in small: images shrink twice, latents have 4 channels."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, **changes).eval()


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """A folder that diffusers saved; not to be written to."""
    folder = tmp_path_factory.mktemp("vae")
    make_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(vae, tmp_path) -> Path:
    """The same, to be written to."""
    for name in ("config.json", WEIGHTS):
        (tmp_path / name).write_bytes((vae / name).read_bytes())
    return tmp_path


# --- what they compute


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scaling_factor": 1.5, "shift_factor": 0.1, "latent_channels": 16},
        {"use_quant_conv": False, "use_post_quant_conv": False},
    ],
)
@torch.no_grad()
def test_sd_vae_computes_what_diffusers_does(settings):
    reference = make_vae(**settings)
    ours, images = SDVAE(reference, (16, 24)), torch.rand(2, 3, 16, 24)
    scale, shift = settings.get("scaling_factor", 0.18215), settings.get("shift_factor", 0.0)
    latents = (reference.encode(2 * images - 1).latent_dist.mode() - shift) * scale
    assert ours.latent_shape == tuple(latents.shape[1:]) == (settings.get("latent_channels", 4), 8, 12)
    torch.testing.assert_close(ours.encode(images), latents, rtol=0, atol=0)
    decoded = (reference.decode(latents / scale + shift).sample + 1) / 2
    torch.testing.assert_close(ours.decode(latents), decoded, rtol=0, atol=0)


def test_sd_vae_is_frozen_and_never_random(vae):
    autoencoder, images = open_autoencoder(f"sd-vae:{vae}@16").train(), torch.rand(2, 3, 16, 16)
    latents = autoencoder.encode(images)
    assert torch.equal(latents, autoencoder.eval().encode(images))
    assert not latents.requires_grad
    assert not autoencoder.decode(latents).requires_grad


def test_pixels_are_affine_and_come_back_exactly():
    autoencoder = open_autoencoder("pixels@16x16")
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    latents = autoencoder.encode(to_unit(levels))
    assert (latents.min(), latents.max()) == (-1, 1)
    assert torch.equal(to_bytes(autoencoder.decode(latents)), levels)
    torch.testing.assert_close(autoencoder.decode(torch.full((1, 3, 16, 16), 3.0)), torch.full((1, 3, 16, 16), 2.0))


# --- what stage 2 asks of them


def test_all_three_have_the_interface(vae, runs):
    wanted = {name for name, _ in inspect.getmembers(Autoencoder) if not name.startswith("_")}
    wanted |= set(Autoencoder.__annotations__)
    assert {"decoder", "encode", "decode", "to", "latent_identity", "latent_shape", "image_size"} < wanted
    for name in (runs / "decoder", f"sd-vae:{vae}@16", "pixels@16"):
        autoencoder = open_autoencoder(name)
        assert not {part for part in wanted if not hasattr(autoencoder, part)}
        images = torch.rand(2, 3, *autoencoder.image_size)
        latents = autoencoder.encode(images)
        assert tuple(latents.shape[1:]) == autoencoder.latent_shape
        assert autoencoder.decode(latents).shape[2:] == autoencoder.output_size
        assert next(autoencoder.decoder.parameters()).device == images.device
        assert autoencoder.to(images.device) is autoencoder


def test_identity_is_that_of_the_latents():
    def identity(size=(16, 16), touch=None, **settings) -> str:
        vae = make_vae(**settings)
        if touch:
            next(getattr(vae, touch).parameters()).data += 1
        return SDVAE(vae, size).latent_identity

    assert identity() == identity(touch="decoder") == identity(touch="post_quant_conv")
    others = [identity(touch="encoder"), identity(touch="quant_conv"), identity((32, 16)), identity(scaling_factor=1.0)]
    others += [identity(shift_factor=0.1), Pixels((16, 16)).latent_identity, Pixels((16, 32)).latent_identity]
    assert len({identity(), *others}) == 8


def test_decoders_have_checksums_of_their_own(vae):
    decoders = [make_vae(), make_vae()]
    decoders[1].post_quant_conv.weight.data += 1
    sums = [weights_sha256(SDVAE(decoder, (16, 16)).decoder.state_dict().values()) for decoder in decoders]
    assert sums[0] != sums[1]
    assert weights_sha256(Pixels((8, 8)).decoder.state_dict().values())


@pytest.mark.parametrize("name", ["pixels@16", "sd-vae@16"])
def test_stage_2_trains_and_samples(vae, tmp_path, run, name):
    name = name.replace("sd-vae", f"sd-vae:{vae}")
    network = {"network__kind": "dit", "network__head": None, "network__size": (32, 2, 2), "network__patch_size": 2}
    folder = train_dit(dit_recipe(name, **network, **LONGER, optim__lr=3e-3), tmp_path / "run")
    losses = log(folder, "loss")
    assert losses[-1] < 0.8 * losses[0]
    model, autoencoder = DiffusionModel.from_pretrained(folder), open_autoencoder(name)
    assert model.config.latent_identity == autoencoder.latent_identity
    shape = autoencoder.latent_shape
    assert model.flow.shift == max(1, (shape[0] * shape[1] * shape[2] / 4096) ** 0.5)
    (batch,) = generate(model, autoencoder, ["3", "7"], seeds=[0, 1], steps=3)
    assert batch.images.shape == (2, 3, 16, 16)
    # by the command, which finds the autoencoder in the run's own recipe
    run("sample", folder, "--num", "2", "--steps", "3", "--out", tmp_path / "samples")
    protocol = json.loads((tmp_path / "samples/samples.json").read_text())
    assert protocol["latents"] == autoencoder.latent_identity


def test_a_model_of_pixels_refuses_other_pixels(tmp_path):
    network = {"network__kind": "dit", "network__head": None, "network__size": (48, 2, 1), "network__patch_size": 4}
    folder = train_dit(dit_recipe("pixels@16", **network, run__duration="1st"), tmp_path / "run")
    model = DiffusionModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"latents are \(3, 32, 32\), the model wants \(3, 16, 16\)"):
        generate(model, open_autoencoder("pixels@32"), [0], seeds=[0])


def test_patches_wider_than_the_network_are_refused(tmp_path):
    network = {"network__kind": "dit", "network__head": None, "network__size": (16, 2, 1), "network__patch_size": 4}
    with pytest.raises(ValueError, match="width 16 cannot denoise tokens of 48 numbers"):
        train_dit(dit_recipe("pixels@16", **network), tmp_path / "run")


# --- names


def test_names(runs, vae):
    assert isinstance(open_autoencoder(runs / "decoder"), RAE)
    assert isinstance(open_autoencoder(f"sd-vae:{vae}@32x16"), SDVAE)
    assert open_autoencoder(f"sd-vae:{vae}@32x16").image_size == (32, 16)
    assert open_autoencoder("pixels@8").latent_shape == (3, 8, 8)
    assert [is_baseline(name) for name in ("pixels@8", "sd-vae:x@8", "pixels", "runs/pixels", "sd-vae/x")] == [
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("name", ["pixels", "pixels:256", "pixels@", "pixels@0", "pixels@8x", "sd-vae@8", "sd-vae:x/y"])
def test_names_that_are_nearly_right_are_explained(name):
    with pytest.raises(ValueError, match=r"write pixels@SIZE or sd-vae:FOLDER_OR_HUB_ID@SIZE"):
        open_autoencoder(name)


# --- what is refused


def test_wrong_sizes_are_refused(vae):
    with pytest.raises(ValueError, match=r"images of \(16, 15\) for a VAE that shrinks 2 times"):
        open_autoencoder(f"sd-vae:{vae}@16x15")
    for autoencoder in (open_autoencoder(f"sd-vae:{vae}@16"), Pixels((16, 16))):
        with pytest.raises(
            ValueError, match=r"images of shape \[1, 3, 8, 16\] given to an autoencoder of \['B', 3, 16"
        ):
            autoencoder.encode(torch.rand(1, 3, 8, 16))
        with pytest.raises(ValueError, match=r"latents of shape \[5, 16, 16\]"):
            autoencoder.decode(torch.rand(5, 16, 16))


def test_scaling_by_channel_is_refused():
    with pytest.raises(ValueError, match="latents_mean and latents_std"):
        SDVAE(make_vae(latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4), (16, 16))


def test_missing_library_is_named(vae, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SourceError, match=r"needs diffusers: pip install 'rae\[diffusers\]'"):
        open_autoencoder(f"sd-vae:{vae}@16")
    assert open_autoencoder("pixels@16").image_size == (16, 16)


def test_foreign_folders_are_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    with pytest.raises(SourceError, match="holds a VQModel of diffusers; what is needed here is an AutoencoderKL"):
        open_autoencoder(f"sd-vae:{copied}@16")
    (copied / "config.json").unlink()
    with pytest.raises(SourceError, match="holds no model of diffusers"):
        open_autoencoder(f"sd-vae:{copied}@16")
    with pytest.raises(SourceError, match="no such folder"):
        open_autoencoder(f"sd-vae:{copied}/absent@16")


def test_missing_and_damaged_weights_are_refused(copied):
    weights = load_file(copied / WEIGHTS)
    save_file({k: v for k, v in weights.items() if k != "quant_conv.weight"}, copied / WEIGHTS, {"format": "pt"})
    with pytest.raises(SourceError, match=r"does not fit its config.json.*quant_conv.weight"):
        open_autoencoder(f"sd-vae:{copied}@16")
    (copied / WEIGHTS).write_bytes((copied / WEIGHTS).read_bytes()[:5000])
    with pytest.raises(SourceError, match="cannot be loaded"):
        open_autoencoder(f"sd-vae:{copied}@16")
    (copied / WEIGHTS).rename(copied / "diffusion_pytorch_model.bin")  # a pickle by name, which is not asked for
    with pytest.raises(SourceError, match="cannot be loaded"):
        open_autoencoder(f"sd-vae:{copied}@16")
