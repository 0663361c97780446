"""The models that are measured, at one size, and what is done with them. `reference.py` is the same of the authors'."""

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from rae import RAE, AutoGuidance, Decoder, DecoderConfig, DiffusionModel, DiTDHConfig, Flow, load_encoder
from rae.data.order import noise_draws
from rae.diffusion.guidance import CFG
from rae.diffusion.model import DiffusionModelConfig
from rae.diffusion.sampling import euler, time_grid
from rae.interop.official import convert_decoder, convert_stage2
from rae.training.dit_recipe import DiTOptimConfig
from rae.training.optim import build_optimizers, make_ema, update_ema

CHANNELS, SIDE, CLASSES = 384, 16, 10  # latents of DINOv2-S at 256 px
SHIFT = Flow.for_latents((CHANNELS, SIDE, SIDE)).shift
HEAD = (2048, 16, 2)  # width, heads, depth
DEPTHS = {"main": 12, "weak": 4}  # DiT-DH-S, and a shallower one to guide it
WIDTH, HEADS = 384, 6
DECODER = "ViT-B"
SCALE = 1.42
POINTS = 3  # of the sampler's grid: two steps
TRAINING = {"lr": 2e-4, "betas": (0.9, 0.95), "weight_decay": 0.0}  # the paper's
EMA, CLIP = 0.9995, 1.0


@dataclass(frozen=True)
class Inputs:
    """One batch of everything, the same for both sides."""

    x: Tensor
    t: Tensor
    y: Tensor
    images: Tensor

    @classmethod
    def draw(cls, batch: int) -> "Inputs":
        generator = torch.Generator().manual_seed(0)
        return cls(
            x=torch.randn(batch, CHANNELS, SIDE, SIDE, generator=generator),
            t=torch.rand(batch, generator=generator),
            y=torch.randint(CLASSES, (batch,), generator=generator),
            images=torch.rand(batch, 3, 256, 256, generator=generator),
        )

    def __getitem__(self, batch: slice) -> "Inputs":
        return replace(self, x=self.x[batch], t=self.t[batch], y=self.y[batch], images=self.images[batch])


def save_encoder(folder: Path) -> None:
    """A DINOv2-S with registers, in its published shape, with random weights."""
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    transformers.Dinov2WithRegistersModel(config).save_pretrained(folder)


class Ours:
    """This package's models: fresh ones, or with the weights that `reference.save_weights` wrote."""

    def __init__(self, folder: Path, *, weights: bool):
        self.folder, self.weights = folder, weights

    def _model(self, name: str) -> DiffusionModel:
        flow = Flow(shift=SHIFT)
        if self.weights:
            return convert_stage2(self.folder / f"{name}.safetensors", flow=flow).requires_grad_(True)
        network = DiTDHConfig(
            in_channels=CHANNELS, grid=(SIDE, SIDE), num_classes=CLASSES, width=WIDTH, heads=HEADS, depth=DEPTHS[name],
            head_width=HEAD[0], head_heads=HEAD[1], head_depth=HEAD[2],
        )  # fmt: skip
        return DiffusionModel(DiffusionModelConfig(network=network, flow=flow))

    @cached_property
    def main(self) -> DiffusionModel:
        return self._model("main")

    @cached_property
    def weak(self) -> DiffusionModel:
        return self._model("weak")

    @cached_property
    def rae(self) -> RAE:
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        encoder = load_encoder(self.folder / "encoder", image_size=256, mean=mean, std=std)
        if self.weights:
            decoder = convert_decoder(self.folder / "decoder.safetensors")
        else:
            decoder = Decoder(
                DecoderConfig.of_size(DECODER, latent_channels=CHANNELS, patch_size=16, grid=(SIDE, SIDE))
            )
        return RAE(encoder, decoder, None)

    @torch.no_grad()
    def forward(self, batch: Inputs, dtype: torch.dtype) -> Tensor:
        return self.main.network(batch.x, batch.t, batch.y, dtype=dtype)

    def forward_backward(self, batch: Inputs, dtype: torch.dtype) -> Tensor:
        network = self.main.network
        network.zero_grad(set_to_none=True)
        network(batch.x, batch.t, batch.y, dtype=dtype).square().mean().backward()
        return network.final.linear.weight.grad

    @cached_property
    def trained(self) -> tuple[DiffusionModel, list[torch.optim.Optimizer], DiffusionModel]:
        model = copy.deepcopy(self.main)
        config = DiTOptimConfig(ema=EMA, **TRAINING)
        return model, build_optimizers(config, model.network.parameter_groups()), make_ema(model)

    def train(self, batch: Inputs, dtype: torch.dtype) -> Tensor:
        """One step: noise and times drawn, loss, gradients, clipping, AdamW, average."""
        model, optimizers, ema = self.trained
        noise, u = noise_draws(range(len(batch.x)), 0, batch.x.shape[1:])

        def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return model.network(x, t, y, dtype=dtype)

        loss = model.flow.loss(predict, batch.x, batch.y, model.flow.times(u[:, 0]), noise).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update_ema(ema, model, EMA)
        return loss.detach()

    def sample(self, batch: Inputs, guidance: str) -> Tensor:
        wrap = {
            "unguided": lambda model: model,
            "CFG": CFG(SCALE).wrap,
            "AutoGuidance": lambda model: AutoGuidance(self.weak, SCALE).wrap(model),
        }[guidance]
        *_, z = euler(wrap(self.main), batch.x, batch.y, time_grid(POINTS, SHIFT, "points"))
        return z

    @torch.no_grad()
    def encode(self, batch: Inputs) -> Tensor:
        return self.rae.encode(batch.images)

    @torch.no_grad()
    def decode(self, batch: Inputs) -> Tensor:
        return self.rae.decode(batch.x)

    def flops(self, batch: Inputs) -> int:
        """Floating-point operations of one forward pass, from the shapes of its matrix products."""
        network, total = self.main.network, 0

        def count(module: nn.Linear, inputs, output: Tensor) -> None:
            nonlocal total
            total += 2 * output.numel() * module.in_features

        hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Linear)]
        self.forward(batch, torch.float32)
        for hook in hooks:
            hook.remove()
        attention = sum(4 * SIDE**4 * block.attn.proj.in_features for block in [*network.blocks, *network.head_blocks])
        return total + len(batch.x) * attention
