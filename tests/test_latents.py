"""Latent statistics against a two-pass float64 computation; standardisation and token maps against their inverses."""

import math
import resource

import pytest
import torch

from rae.autoencoder.latents import (
    LatentStats,
    add_noise,
    draw_sigma,
    map_to_tokens,
    standardise,
    tokens_to_map,
    unstandardise,
)

SHAPE = (5, 3, 4)


def stats_of(*batches: torch.Tensor) -> LatentStats:
    stats = LatentStats(SHAPE)
    for batch in batches:
        stats.update(batch)
    return stats


@pytest.fixture
def latents() -> torch.Tensor:
    """200 maps with an offset far from zero and elements that hardly vary, where a one-pass variance fails."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, *SHAPE, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-7, 1, math.prod(SHAPE), dtype=torch.float64).view(SHAPE) + 100
    x[:, 0, 0, 0] = 3.0
    return x


def assert_exact(stats: LatentStats, x: torch.Tensor) -> None:
    assert stats.count == len(x)
    torch.testing.assert_close(stats.mean, x.mean(dim=0), rtol=1e-14, atol=0)
    # Rounding of the mean (1e-14 of 100) enters the variance squared; below that a value has no digits left.
    torch.testing.assert_close(stats.var, x.var(dim=0, correction=0), rtol=1e-6, atol=1e-24)


@pytest.mark.parametrize("split", [[200], [1] * 200, [1, 199], [64, 64, 64, 8], [7] * 28 + [4]])
def test_any_split_gives_the_two_pass_result(latents, split):
    assert_exact(stats_of(*latents.split(split)), latents)


def test_order_does_not_matter(latents):
    shuffled = latents[torch.randperm(len(latents), generator=torch.Generator().manual_seed(1))]
    assert_exact(stats_of(*shuffled.split(13)), latents)


def test_merging_processes_equals_one_process(latents):
    parts = [stats_of(*part.split(9)) for part in latents.split([150, 1, 49])]
    total = LatentStats(SHAPE)
    for part in [LatentStats(SHAPE), *reversed(parts)]:
        total.merge(part)
    assert_exact(total, latents)


def test_constant_element_has_variance_zero(latents):
    assert stats_of(*latents.split(11)).var[0, 0, 0] == 0


def test_float32_batches_are_summed_in_float64():
    x = torch.full((1000, *SHAPE), 1e4) + torch.arange(1000).view(-1, 1, 1, 1) % 2
    stats = stats_of(*x.split(10))
    torch.testing.assert_close(stats.var, torch.full(SHAPE, 0.25, dtype=torch.float64), rtol=1e-12, atol=0)


def test_save_and_load_keep_every_bit(latents, tmp_path):
    stats = stats_of(latents)
    stats.save(tmp_path / "stats.safetensors")
    loaded = LatentStats.load(tmp_path / "stats.safetensors")
    assert loaded.count == stats.count
    assert torch.equal(loaded.mean, stats.mean)
    assert torch.equal(loaded.m2, stats.m2)
    assert [file.name for file in tmp_path.iterdir()] == ["stats.safetensors"]


def test_a_full_disk_leaves_what_was_there(latents, tmp_path):
    file = tmp_path / "stats.safetensors"
    stats_of(latents[:100]).save(file)
    before, limit = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))
    try:
        with pytest.raises(OSError, match=r"stats\.safetensors could not be written"):
            stats_of(latents).save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["stats.safetensors"]


def test_bad_files_and_bad_input_are_named(latents, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        LatentStats.load(tmp_path / "none.safetensors")
    file = tmp_path / "stats.safetensors"
    stats_of(latents).save(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"stats\.safetensors is not a readable .* delete it\. The run"):
        LatentStats.load(file)
    stats = LatentStats(SHAPE)
    with pytest.raises(ValueError, match="seen no latents"):
        _ = stats.var
    with pytest.raises(ValueError, match=r"\[2, 3, 4\] do not fit"):
        stats.update(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="NaN"):
        stats.update(torch.full((2, *SHAPE), float("nan")))
    with pytest.raises(ValueError, match="cannot be merged"):
        stats.merge(LatentStats((5, 3, 3)))
    assert stats.count == 0


def test_standardise_and_unstandardise_are_inverse(latents):
    mean, var = latents.mean(dim=0), latents.var(dim=0, correction=0)
    z = standardise(latents, mean, var, eps=1e-30)
    wide = var > 1e-12  # above the rounding of values near 100
    torch.testing.assert_close(z.var(dim=0, correction=0)[wide], torch.ones_like(var)[wide], rtol=1e-6, atol=0)
    torch.testing.assert_close(unstandardise(z, mean, var, eps=1e-30), latents, rtol=1e-14, atol=0)


def test_eps_is_inside_the_square_root():
    z = standardise(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), eps=0.25)
    assert z.item() == 2.0


def test_tokens_and_maps_are_inverse_and_row_major():
    tokens = torch.arange(2 * 6 * 3).view(2, 6, 3)
    z = tokens_to_map(tokens, (2, 3))
    assert z.shape == (2, 3, 2, 3)
    assert torch.equal(z[1, :, 1, 2], tokens[1, 5])
    assert torch.equal(map_to_tokens(z), tokens)
    with pytest.raises(ValueError, match="6 tokens do not fill a grid of 3 x 3"):
        tokens_to_map(tokens, (3, 3))


def test_laws_of_sigma_have_their_means():
    tau, quantiles = 0.8, (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    uniform = draw_sigma("uniform", tau, quantiles)
    half_normal = draw_sigma("half-normal", tau, torch.special.ndtri(quantiles))
    assert uniform.mean().item() == pytest.approx(tau / 2, rel=1e-6)
    assert half_normal.mean().item() == pytest.approx(tau * math.sqrt(2 / math.pi), rel=1e-4)
    assert half_normal.min() >= 0
    with pytest.raises(ValueError, match="'half-normal'"):
        draw_sigma("normal", tau, quantiles)


def test_noise_has_one_sigma_per_image():
    noise = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    noised = add_noise(torch.ones(3, 4, 5, dtype=torch.float64), sigma, noise)
    torch.testing.assert_close(noised - 1, torch.stack([0 * noise[0], noise[1], 2 * noise[2]]))
