"""The KL autoencoder of the studies: its loss in closed form, what it learns, what stands on the disk."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from rae.autoencoder.baselines import open_autoencoder
from rae.data.images import to_unit
from rae.experiments.vae import VAERecipe, build_vae, train_vae, vae_loss, with_margin

WEIGHTS = "diffusion_pytorch_model.safetensors"


def recipe(**changes) -> VAERecipe:
    tiny = {"image_size": 8, "widths": (4, 8), "groups": 2, "beta": 1e-3, "lr": 1e-2, "batch": 4, "steps": 3}
    return VAERecipe(**(tiny | changes))


def pictures(count: int) -> torch.Tensor:
    """uint8 [N,3,8,8]: a bright square somewhere on dark, grey."""
    images = torch.full((count, 3, 8, 8), 20, dtype=torch.uint8)
    for i in range(count):
        row, column = divmod(i * 5 % 16, 4)
        images[i, :, row : row + 4, column : column + 4] = 220
    return images


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Not to be written to."""
    return train_vae(recipe(), pictures(8), tmp_path_factory.mktemp("vae") / "vae")


class _Fixed(torch.nn.Module):
    """Puts out the same numbers for all images."""

    def __init__(self, numbers: torch.Tensor) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.numbers.expand(len(x), -1, -1, -1)


def test_the_loss_is_the_sum_in_closed_form():
    vae, x = build_vae(recipe(image_size=4, latent_channels=1)).double(), torch.rand(3, 3, 4, 4).double()
    mean = torch.tensor([[0.0, 1.0], [-2.0, 0.5]]).double()
    variance = torch.tensor([[1.0, 1.0], [4.0, 0.25]]).double()
    vae.encoder = _Fixed(torch.stack([mean, variance.log()])[None])
    vae.quant_conv = torch.nn.Identity()
    vae.post_quant_conv = torch.nn.Identity()
    vae.decoder.forward = lambda z, _=None: z.repeat(1, 3, 2, 2)
    loss, parts = vae_loss(vae, x, noise := torch.randn(3, 1, 2, 2).double(), beta=0.1)
    # KL of N(mu, s^2) from N(0, 1) in nats: 0; 1/2; (4 + 4 - 1 - log 4) / 2; (1/4 + 1/4 - 1 - log 1/4) / 2
    kl = (0 + 0.5 + (7 - math.log(4)) / 2 + (-0.5 + math.log(4)) / 2) / 4
    l1 = ((mean + variance.sqrt() * noise).repeat(1, 3, 2, 2) - x).abs().mean().item()
    assert parts == pytest.approx({"l1": l1, "kl": kl}, rel=1e-12)
    assert loss.item() == pytest.approx(l1 + 0.1 * kl, rel=1e-12)


def test_it_learns_a_few_pictures_and_its_latents_are_standardised(tmp_path):
    images = pictures(4)
    folder = train_vae(recipe(widths=(8, 8), steps=120, lr=2e-2, beta=1e-4), images, tmp_path / "vae")
    log = json.loads((folder / "log.json").read_text())
    assert log[-1]["l1"] < 0.15 < log[0]["l1"] / 4, log
    vae = open_autoencoder(f"sd-vae:{folder}@8")
    latents = vae.encode(to_unit(images))
    assert latents.mean().item() == pytest.approx(0, abs=1e-5)
    assert latents.std().item() == pytest.approx(1, abs=1e-5)
    assert (vae.decode(latents) - to_unit(images)).abs().mean() < 0.08


def test_what_is_saved_opens_in_the_same_bits(trained, tmp_path):
    images = to_unit(pictures(5))
    opened, reference = open_autoencoder(f"sd-vae:{trained}@8"), AutoencoderKL.from_pretrained(trained)
    ours, theirs = ([*part.state_dict().values()] for part in (opened.encoder[0], reference.encoder))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with torch.no_grad():
        mean, config = reference.encode(2 * images - 1).latent_dist.mean, reference.config
    expected = (mean - config.shift_factor) * config.scaling_factor
    torch.testing.assert_close(opened.encode(images), expected, rtol=0, atol=1e-5)
    again = train_vae(recipe(), pictures(8), tmp_path / "again")
    assert (again / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    other = train_vae(recipe(seed=1), pictures(8), tmp_path / "other")
    assert (other / WEIGHTS).read_bytes() != (trained / WEIGHTS).read_bytes()


def test_a_finished_one_is_not_trained_again_and_a_killed_one_is(trained, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(trained, folder)
    (folder / WEIGHTS).write_bytes(b"left alone")
    train_vae(recipe(), pictures(8), folder)
    assert (folder / WEIGHTS).read_bytes() == b"left alone"
    shutil.rmtree(folder)
    hidden = tmp_path / ".vae.new"  # a kill during the last write leaves this
    hidden.mkdir()
    (hidden / WEIGHTS).write_bytes(b"a part")
    train_vae(recipe(), pictures(8), folder)
    assert (folder / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    assert not hidden.exists()


def test_wrong_input_is_named(trained, tmp_path):
    with pytest.raises(ValueError, match=r"multiples of 2"):
        build_vae(recipe(image_size=9))
    with pytest.raises(ValueError, match=r"\[8, 3, 8, 8\] for a VAE of \(16, 16\); crop them"):
        train_vae(recipe(image_size=16), pictures(8), tmp_path / "vae")
    with pytest.raises(ValueError, match=r"torch.float32 images"):
        train_vae(recipe(), pictures(8).float(), tmp_path / "vae")
    with pytest.raises(ValueError, match=r"another recipe: .*'lr': 0.01.*, not .*'lr': 0.5"):
        train_vae(recipe(lr=0.5), pictures(8), trained)
    with pytest.raises(FloatingPointError, match=r"at step \d+; a lower lr than 1e\+30"):
        train_vae(recipe(lr=1e30), pictures(8), tmp_path / "vae")
    assert not (tmp_path / "vae").exists()


def test_a_margin_continues_the_edge_and_comes_off_again():
    images = torch.randint(0, 256, (2, 3, 5, 6), dtype=torch.uint8)
    wider = with_margin(images, 2)
    assert (wider.shape, wider.dtype) == ((2, 3, 9, 10), torch.uint8)
    assert torch.equal(wider[:, :, 2:-2, 2:-2], images)
    assert torch.equal(wider[:, :, 0, 2:-2], images[:, :, 0])
    assert torch.equal(wider[:, :, 2:-2, -1], images[:, :, :, -1])
