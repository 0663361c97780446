"""Stage 1's loss, taken at the image (arXiv 2510.11690, App. B).

    L = L1 + w_p * perceptual + w_a * lambda * adversarial,    lambda = |g_rec| / (|g_gan| + 1e-6)

All of it is a function of the reconstructed image alone, so each loss's gradient is taken there once. lambda is formed
from the two, or from what they are at the decoder's last layer (one matrix product each); their weighted sum then goes
back through the decoder. The networks that judge are traversed backwards once, and no graph of theirs is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from rae.autoencoder.decoder import patchify
from rae.autoencoder.encoders import Encoder
from rae.config import Config
from rae.evaluation.pretrained import load_lpips
from rae.training.adversarial import AdversarialConfig, Adversary, adaptive_weight, health
from rae.training.durations import Duration
from rae.training.perceptual import feature_distance
from rae.training.run import DTYPES, Run

PATIENCE = 200  # steps of the discriminator before anything is said of the game


class PerceptualConfig(Config):
    """weight * d(reconstruction, original), from `start` on."""

    kind: Literal["lpips", "encoder"] = "lpips"  # LPIPS on VGG16, or the distance of the encoder's own features
    weight: PositiveFloat = 1.0
    start: Duration = "0st"
    vgg16: str | None = None  # LPIPS's files, where they are not downloaded: vgg16-397923af.pth,
    heads: str | None = None  # and vgg.pth of LPIPS 0.1


class LossConfig(Config):
    """L1 at the image, weight 1, and what is added to it."""

    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None


@dataclass
class Part:
    """A micro-batch: originals [b,3,H,W] in [0,1], tokens [b,N,C] without and with noise, places in the stream."""

    image: Tensor
    tokens: Tensor
    noisy: Tensor
    positions: list[int]


@dataclass
class Gradients:
    """Of the losses' means over a process's batch, with respect to some of its decoded images [b,3,H,W].

    Attributes:
        reconstruction: of L1 and the perceptual term.
        adversarial: of the adversarial term; None while it is off.
        figures: [3], what these images add to the means of L1, perceptual and adversarial loss.
        norms: what lambda compares, of reconstruction and adversary: at the last layer the gradients of its weight
            [2,p p 3,W], at the image the sums of squares of the gradients with respect to images in [0,1] [2].
    """

    reconstruction: Tensor
    adversarial: Tensor | None
    figures: Tensor
    norms: Tensor | None


class Objective:
    """The losses of a recipe, with the networks that they need, and the training of the discriminator.

    Args:
        config: which losses.
        encoder: whose tokens are decoded.
        patch_size: of the decoder.
        run: the run at work; says how many images were seen, and gathers from all processes.
        seed: of the run.
        epoch: images in an epoch, for durations given in epochs.

    Raises:
        SourceError: weights of a judging network that cannot be had, with what to take instead.
        ConfigError: settings that contradict each other.
    """

    def __init__(
        self, config: LossConfig, encoder: Encoder, patch_size: int, run: Run, *, seed: int, epoch: int
    ) -> None:
        self.config, self.encoder, self.patch_size, self.run = config, encoder, patch_size, run
        self._dtype = DTYPES[run.config.precision]
        self._lpips, self._perceptual_from = None, 0
        if perceptual := config.perceptual:
            if perceptual.kind == "lpips":
                self._lpips = load_lpips(perceptual.vgg16, perceptual.heads).to(run.accelerator.device)
            self._perceptual_from = run.starts_at("loss.perceptual.start", perceptual.start, epoch=epoch)
        self._adversary = Adversary(config.adversarial, run, seed, epoch) if config.adversarial else None
        self._shown: list[tuple[Part, Tensor | None]] = []  # for the discriminator's step

    def describe(self) -> str:
        """What the decoder is judged by, for the log: names every network."""
        parts = ["L1"]
        if perceptual := self.config.perceptual:
            parts.append(f"{perceptual.weight:g} x perceptual ({self._perceptual_judge}, from {perceptual.start})")
        if adversarial := self.config.adversarial:
            own = adversarial.discriminator
            parts.append(
                f"{adversarial.weight:g} x lambda x adversarial (discriminator on {own.features}, trained from "
                f"{own.start}, used from {adversarial.start})"
            )
        return "loss: " + " + ".join(parts)

    def judges(self) -> dict[str, str]:
        """The networks that judge, by the term that asks them, for the log and for checkpoints; none for L1."""
        judges = {"perceptual": self._perceptual_judge} if self.config.perceptual else {}
        if self._adversary:
            features = self.config.adversarial.discriminator.features
            judges["adversarial"] = f"discriminator on {features} ({self._adversary.frozen.identity()[:12]})"
        return judges

    def identity(self) -> dict[str, str]:
        """Of the networks that a resumed run must find again."""
        return {"discriminator features": self._adversary.frozen.identity()} if self._adversary else {}

    def backward(self, decoder: nn.Module, parts: Iterator[Part]) -> dict[str, float]:
        """Add the gradients of a step's loss, over the whole batch of all processes, to those of the decoder.

        Args:
            decoder: the decoder, or what wraps it for several processes.
            parts: the step's micro-batches.

        Returns:
            The step's figures: loss (of reconstruction), l1, perceptual, and adversarial and lambda while they are on.

        Raises:
            TrainingError: a figure that is not finite.
        """
        plays, trains = (self._adversary and getattr(self._adversary, on) for on in ("plays", "trains"))
        judged, weight, norms, total = [], None, 0.0, torch.zeros(3, device=self.run.accelerator.device)
        parts = list(parts) if trains else parts
        if plays and len(parts) > 1:
            # lambda is of the whole batch: all of it is judged first, and then decoded once more with a graph
            for part in parts:
                with torch.no_grad():
                    decoded, hidden = self._decode(decoder, part.noisy)
                judged.append(self._judge(decoded, hidden, part))
                norms, judged[-1].norms = norms + judged[-1].norms, None  # as large as the last layer, each
            weight = self._weight(norms)
        for number, part in enumerate(self.run.accumulate(decoder, parts)):
            decoded, hidden = self._decode(decoder, part.noisy)
            gradients = judged[number] if judged else self._judge(decoded, hidden, part)
            if plays and not judged:
                weight = self._weight(gradients.norms)
            decoded.backward(self._combine(gradients, weight))
            total += gradients.figures
            if trains:
                reused = self.config.adversarial.discriminator.fakes == "reused"
                self._shown.append((part, decoded.detach() if reused else None))
        l1, perceptual, adversarial = self.run.average(total)
        figures = {"loss": l1, "l1": l1}
        if self._perceived:
            figures |= {"loss": l1 + self.config.perceptual.weight * perceptual, "perceptual": perceptual}
        if plays:
            figures |= {"adversarial": adversarial, "lambda": weight.item()}
        return figures

    def train_adversary(self, decoder: nn.Module) -> dict[str, float]:
        """The discriminator's step on the images of the last `backward`, if it is its time; its figures."""
        if not self._shown:
            return {}

        def pairs() -> Iterator[tuple[Tensor, Tensor, list[int]]]:
            for part, fake in self._shown:
                if fake is None:
                    with torch.no_grad():
                        fake, _ = self._decode(decoder, part.tokens)
                yield part.image * 2 - 1, self.encoder.denormalise(fake) * 2 - 1, part.positions

        figures = self._adversary.step(pairs())
        self._shown = []
        return figures

    def health(self, figures: dict[str, float]) -> str | None:
        """What the means of a log line say about the game; None if nothing is wrong with it."""
        if "d_accuracy" not in figures or self._adversary.steps < PATIENCE:
            return None
        return health(figures, self.config.adversarial.limit)

    def save(self, folder: Path) -> None:
        if self._adversary:
            self._adversary.save(folder)

    def load(self, folder: Path) -> None:
        if self._adversary:
            self._adversary.load(folder)

    @property
    def _perceptual_judge(self) -> str:
        return "LPIPS (VGG16)" if self._lpips else f"features of the encoder, {self.encoder.config.name}"

    @property
    def _perceived(self) -> bool:
        """Whether the perceptual term is on in this step."""
        return self.config.perceptual is not None and self.run.seen >= self._perceptual_from

    # --- at the image ------------------------------------------------------------------------------------------------

    def _decode(self, decoder: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return decoder(tokens, dtype=self._dtype, recompute=self.run.config.recompute, hidden=True)

    def _judge(self, decoded: Tensor, hidden: Tensor, part: Part) -> Gradients:
        """Decoded images [b,3,H,W] in the encoder's normalised units -> the losses' gradients there.

        Args:
            decoded: as the decoder puts them out.
            hidden: [b,N,W], what its last layer made them from.
            part: their originals.
        """
        # one leaf, from which both losses are computed: [0,1] images, not clamped
        x = self.encoder.denormalise(decoded.detach()).requires_grad_()
        l1 = (x - part.image).abs().mean((1, 2, 3))
        reconstruction, perceptual, adversarial = l1, torch.zeros_like(l1), torch.zeros_like(l1)
        if self._perceived:
            if self._lpips:
                perceptual = self._lpips(part.image * 2 - 1, x * 2 - 1)
            else:
                perceptual = feature_distance(self.encoder, self.encoder.normalise(x), part.tokens)
            reconstruction = l1 + self.config.perceptual.weight * perceptual
        of_reconstruction, of_adversarial, norms = self._gradient(reconstruction, x), None, None
        if self._adversary and self._adversary.plays:
            adversarial = self._adversary.generator(x * 2 - 1, part.positions)
            of_adversarial = self._gradient(adversarial, x)
            norms = self._norms(of_reconstruction, of_adversarial, hidden)
        figures = torch.stack([loss.detach().sum() for loss in (l1, perceptual, adversarial)]) / self.run.local_batch
        both = (None if g is None else self._through_normalisation(g) for g in (of_reconstruction, of_adversarial))
        return Gradients(*both, figures, norms)

    def _gradient(self, losses: Tensor, x: Tensor) -> Tensor:
        """Of the losses' share of the mean over the process's batch, with respect to [0,1] images."""
        (gradient,) = torch.autograd.grad(losses.sum() / self.run.local_batch, x)
        return gradient

    def _through_normalisation(self, gradient: Tensor) -> Tensor:
        """With respect to [0,1] images -> to what the decoder puts out: images = decoded * std + mean."""
        return gradient * gradient.new_tensor(self.encoder.std).view(3, 1, 1)

    def _norms(self, reconstruction: Tensor, adversarial: Tensor, hidden: Tensor) -> Tensor:
        """What lambda compares, from gradients with respect to [0,1] images; see `Gradients`."""
        both = (reconstruction, adversarial)
        if self.config.adversarial.adapt_at == "image":
            return torch.stack([gradient.square().sum() for gradient in both])
        # patches = hidden W^T + b, so the gradient of W is (gradient of the patches)^T hidden
        inputs = hidden.flatten(0, 1).to(reconstruction.dtype)
        patches = (patchify(self._through_normalisation(g), self.patch_size).flatten(0, 1) for g in both)
        return torch.stack([g.T @ inputs for g in patches])

    def _weight(self, norms: Tensor) -> Tensor:
        """lambda of the whole batch of all processes, from the sum of its parts' `norms`."""
        accelerator = self.run.accelerator
        if self.config.adversarial.adapt_at == "last-layer":
            both = accelerator.reduce(norms, "mean").flatten(1).norm(dim=1)
        else:  # the loss is the mean over processes: of it, each one's gradients are a world-th
            both = accelerator.reduce(norms, "sum").sqrt() / accelerator.num_processes
        return adaptive_weight(*both, limit=self.config.adversarial.limit)

    def _combine(self, gradients: Gradients, weight: Tensor | None) -> Tensor:
        if weight is None:
            return gradients.reconstruction
        return gradients.reconstruction + self.config.adversarial.weight * weight * gradients.adversarial
