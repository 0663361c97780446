"""The encoder over a whole data set, some of whose files cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from rae.autoencoder.baselines import Pixels
from rae.autoencoder.latents import LatentStats
from rae.config import ConfigError
from rae.data.images import DataConfig, ImageError, open_images, to_unit
from rae.processes import ProcessError, accelerator
from rae.training.display import progress
from rae.training.latents import cache_latents, cache_tokens, check_crop, latent_statistics


@pytest.fixture
def folder(tmp_path):
    """Five images of noise, the second and the last of which are cut short."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    for i in (1, 4):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes()[:40])
    return tmp_path


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_unreadable_images_are_left_out_of_the_statistics(folder, batch):
    images, data = open_images(folder), DataConfig(source=str(folder), on_broken="skip")
    stats = latent_statistics(lambda x: x, (3, 4, 6), images, data, (4, 6), batch=batch)
    expected = LatentStats((3, 4, 6))
    for i in (0, 2, 3):
        expected.update(to_unit(torch.tensor(images[i][0]).permute(2, 0, 1)[None]))
    assert stats.count == expected.count == 3
    assert torch.allclose(stats.mean, expected.mean, rtol=1e-14)
    assert torch.allclose(stats.var, expected.var, rtol=1e-12)


def test_unreadable_images_stop_the_statistics_unless_they_may_be_skipped(folder):
    with pytest.raises(ImageError, match=r"1\.png"):
        latent_statistics(lambda x: x, (3, 4, 6), open_images(folder), DataConfig(source=str(folder)), (4, 6))


def test_images_that_took_the_place_of_unreadable_ones_are_named(folder, capsys):
    from tiny import save_encoder

    from rae import load_encoder

    encoder = load_encoder(save_encoder(folder / ".encoder"), image_size=16)
    data = DataConfig(source=str(folder), on_broken="skip", enlarge=True)
    cache = cache_tokens(encoder, open_images(folder), data, (16, 16))
    assert torch.equal(cache.latents[0, 1], cache.latents[0, 2])  # the next readable one
    printed = capsys.readouterr().err
    assert "1.png cannot be read" in printed
    assert "4.png cannot be read" in printed
    assert "2.png cannot be read" not in printed


def test_every_process_of_a_machine_keeps_latents_of_its_own(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10**12))
    with pytest.raises(ConfigError, match=r"latents: memory needs 0\.0 GiB for 5 images in each of 10{12} processes"):
        cache_latents(Pixels((4, 6)), open_images(folder), DataConfig(source=str(folder)))


def test_random_crops_cannot_be_kept():
    check_crop("tokens", DataConfig(source="digits"))
    with pytest.raises(ConfigError, match=r"tokens: memory .* data\.crop: random never ends; set tokens: online"):
        check_crop("tokens", DataConfig(source="digits", crop="random"))


def test_nothing_is_computed_by_processes_that_do_not_see_each_other(folder, monkeypatch):
    accelerator()  # alone, as accelerate finds it where the launcher's variables are set too late
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    data = DataConfig(source=str(folder), on_broken="skip")
    with pytest.raises(ProcessError, match="the launcher started 2 processes, and this one sees 1"):
        latent_statistics(lambda x: x, (3, 4, 6), open_images(folder), data, (4, 6))
    with pytest.raises(ProcessError, match="the launcher started 2 processes"), progress("images", 3):
        pass
