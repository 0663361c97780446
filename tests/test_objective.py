"""Stage 1's loss taken at the image, against the loss written out and differentiated as a whole."""

from types import SimpleNamespace

import pytest
import torch
from tiny import adversarial, decoder_recipe, save_encoder
from torch import nn

from rae import Decoder, load_encoder
from rae.autoencoder.decoder import unpatchify
from rae.data.order import augmentation_draws
from rae.evaluation.lpips import LPIPS
from rae.training.adversarial import generator_loss
from rae.training.diffaug import diffaug
from rae.training.objective import LossConfig, Objective, Part
from rae.training.perceptual import feature_distance
from rae.training.run import Run

STD = (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def make_run(folder, encoder, **changes) -> Run:
    return Run(folder, decoder_recipe(encoder, **changes), epoch=8)


def draw(generator, *shape, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(*shape, generator=generator, dtype=dtype)


class DoubleDecoder(nn.Module):
    """A decoder of two layers in float64: tokens [B,4,6] -> images [B,3,16,16]."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 10).double(), nn.Linear(10, 8 * 8 * 3).double()

    def forward(self, tokens, *, dtype, recompute, hidden):
        features = self.body(tokens).tanh()
        return unpatchify(self.head(features), (2, 2), 8), features.detach()


@pytest.mark.parametrize("adapt_at", ["last-layer", "image"])
@pytest.mark.parametrize("micro_batch", [8, 3])
def test_gradients_are_those_of_the_loss_written_out_in_float64(encoder_folder, tmp_path, adapt_at, micro_batch):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    decoder, lpips = DoubleDecoder(), LPIPS((4, 4, 4, 4, 4)).double()
    for weight in lpips.weights:
        weight.uniform_(generator=generator)
    critic = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.Tanh(), nn.Conv2d(5, 1, 1)).double().requires_grad_(False)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), STD))
    encoder = SimpleNamespace(denormalise=lambda x: x * std + mean, std=STD)
    image, tokens = draw(generator, 8, 3, 16, 16, dtype=torch.float64), draw(generator, 8, 4, 6, dtype=torch.float64)

    run = make_run(tmp_path / "run", encoder_folder, run__micro_batch=micro_batch)
    config = {"perceptual": {"kind": "encoder", "weight": 0.7}}
    config["adversarial"] = adversarial(encoder_folder, adapt_at=adapt_at)
    objective = Objective(LossConfig.model_validate(config), encoder, 8, run, seed=0, epoch=8)
    objective._lpips = lpips
    objective._adversary = SimpleNamespace(
        plays=True, trains=True, generator=lambda x, positions: generator_loss(critic(x).flatten(1))
    )
    pieces = zip(image.split(micro_batch), tokens.split(micro_batch))
    parts = [Part(image, tokens, tokens, list(range(len(image)))) for image, tokens in pieces]
    figures = objective.backward(decoder, parts)
    ours = [p.grad.clone() for p in decoder.parameters()]

    decoder.zero_grad()
    decoded, _ = decoder(tokens, dtype=None, recompute=False, hidden=True)
    x = decoded * std + mean
    reconstruction = (x - image).abs().mean() + 0.7 * lpips(image * 2 - 1, x * 2 - 1).mean()
    of_critic = -critic(x * 2 - 1).mean()
    at = decoder.head.weight if adapt_at == "last-layer" else x
    norms = [torch.autograd.grad(loss, at, retain_graph=True)[0].norm() for loss in (reconstruction, of_critic)]
    weight = norms[0] / (norms[1] + 1e-6)
    (reconstruction + 0.75 * weight * of_critic).backward()
    assert figures["lambda"] == pytest.approx(weight.item(), rel=1e-6)
    assert figures["loss"] == pytest.approx(reconstruction.item(), rel=1e-6)
    for mine, parameter in zip(ours, decoder.parameters()):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-11, atol=1e-13)


def test_gradients_are_those_of_the_real_networks(encoder_folder, tmp_path):
    recipe = decoder_recipe(encoder_folder)
    encoder = load_encoder(encoder_folder, image_size=(16, 16))
    torch.manual_seed(0)
    decoder = Decoder(recipe.decoder.describe(encoder.config))
    run = make_run(tmp_path / "run", encoder_folder)
    config = {"perceptual": {"kind": "encoder", "weight": 0.1}, "adversarial": adversarial(encoder_folder)}
    objective = Objective(LossConfig.model_validate(config), encoder, 8, run, seed=0, epoch=8)
    image = draw(torch.Generator().manual_seed(0), 8, 3, 16, 16)
    tokens, positions = encoder(image), list(range(8))
    objective.backward(decoder, [Part(image, tokens, tokens, positions)])
    ours = [p.grad.clone() for p in decoder.parameters()]

    decoder.zero_grad()
    decoded = decoder(tokens)
    x = encoder.denormalise(decoded)
    reconstruction = (x - image).abs().mean() + 0.1 * feature_distance(encoder, decoded, tokens).mean()
    logits = objective._adversary.heads(diffaug(x * 2 - 1, augmentation_draws(positions, 0, 0)))
    losses, at = (reconstruction, -logits.mean()), decoder.head.weight
    norms = [torch.autograd.grad(loss, at, retain_graph=True)[0].norm() for loss in losses]
    (losses[0] + 0.75 * norms[0] / (norms[1] + 1e-6) * losses[1]).backward()
    for mine, parameter in zip(ours, decoder.parameters()):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)
