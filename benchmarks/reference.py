"""The authors' modules (github.com/bytetriper/RAE, its folder `src`), run as their scripts run them.

Their imports need `einops`, `torchdiffeq` and `regex`. timm needs torchvision, which has no build for every CPU
machine; the one class they take of it, a patch embedding, is a convolution and stands here.
"""

import contextlib
import copy
import importlib
import importlib.util
import io
import json
import sys
import types
from functools import cached_property
from pathlib import Path

import torch
from models import (
    CHANNELS,
    CLASSES,
    CLIP,
    DEPTHS,
    EMA,
    HEAD,
    HEADS,
    POINTS,
    SCALE,
    SHIFT,
    SIDE,
    TRAINING,
    WIDTH,
    Inputs,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """timm's, as far as they use it."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True):
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def open_checkout(path: Path) -> None:
    """Make the modules of a checkout importable."""
    if not (path / "stage2" / "models" / "DDT.py").is_file():
        raise SystemExit(f"{path} holds no stage2/models/DDT.py; --reference takes the folder `src` of the checkout.")
    missing = [name for name in ("einops", "torchdiffeq", "regex") if not importlib.util.find_spec(name)]
    if missing:
        raise SystemExit(f"the authors' code imports {', '.join(missing)}: pip install --no-deps {' '.join(missing)}")
    timm = types.ModuleType("timm.models.vision_transformer")
    timm.PatchEmbed, timm.Mlp, timm.Attention = PatchEmbed, None, None
    for name in ("timm", "timm.models"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[timm.__name__] = timm
    sys.path.append(str(path))


class Theirs:
    """The interface of `models.Ours`."""

    def __init__(self, folder: Path, checkout: Path, *, weights: bool):
        self.folder, self.checkout, self.weights = folder, checkout, weights

    def _load(self, module: nn.Module, name: str) -> nn.Module:
        if self.weights:
            module.load_state_dict(load_file(self.folder / f"{name}.safetensors"))
        return module.eval()

    def build(self, name: str) -> nn.Module:
        ddt = importlib.import_module("stage2.models.DDT")
        return ddt.DiTwDDTHead(
            SIDE, 1, CHANNELS, [WIDTH, HEAD[0]], [DEPTHS[name], HEAD[2]], [HEADS, HEAD[1]], num_classes=CLASSES
        ).requires_grad_(True)  # as their training script does

    def build_decoder(self) -> nn.Module:
        decoders = importlib.import_module("stage1.decoders.decoder")
        config = json.loads((self.checkout.parent / "configs" / "decoder" / "ViTB" / "config.json").read_text())
        config |= {"hidden_size": CHANNELS, "patch_size": 16, "image_size": 16 * SIDE}
        return decoders.GeneralDecoder(decoders.ViTMAEConfig(**config), num_patches=SIDE**2)

    @cached_property
    def main(self) -> nn.Module:
        return self._load(self.build("main"), "main")

    @cached_property
    def weak(self) -> nn.Module:
        return self._load(self.build("weak"), "weak")

    @cached_property
    def rae(self) -> nn.Module:
        """Their RAE, put together as its constructor does, without the image processor, which needs torchvision."""
        stage1 = importlib.import_module("stage1.rae")
        rae = stage1.RAE.__new__(stage1.RAE)
        nn.Module.__init__(rae)
        with contextlib.redirect_stdout(io.StringIO()):
            rae.encoder = stage1.ARCHS["Dinov2withNorm"](str(self.folder / "encoder"))
        rae.encoder_mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        rae.encoder_std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        rae.encoder_input_size, rae.reshape_to_2d, rae.do_normalization, rae.noise_tau = 224, True, False, 0.0
        rae.decoder = self._load(self.build_decoder(), "decoder")
        return rae.eval()

    @torch.no_grad()
    def forward(self, batch: Inputs, dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return self.main(batch.x, batch.t, batch.y).float()

    def forward_backward(self, batch: Inputs, dtype: torch.dtype) -> Tensor:
        self.main.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = self.main(batch.x, batch.t, batch.y).float().square().mean()
        loss.backward()
        return self.main.final_layer.linear.weight.grad

    @cached_property
    def trained(self) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Tensor]]:
        model = copy.deepcopy(self.main).train()
        return model, torch.optim.AdamW(model.parameters(), **TRAINING), copy.deepcopy(model)

    def train(self, batch: Inputs, dtype: torch.dtype) -> Tensor:
        model, optimizer, ema = self.trained
        transport = importlib.import_module("stage2.transport").create_transport(time_dist_shift=SHIFT)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = transport.training_losses(model, batch.x, {"y": batch.y})["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                average.mul_(EMA).add_(parameter, alpha=1 - EMA)
        return loss.detach()

    @torch.no_grad()
    def sample(self, batch: Inputs, guidance: str) -> Tensor:
        transport = importlib.import_module("stage2.transport")
        sampler = transport.Sampler(transport.create_transport(time_dist_shift=SHIFT))
        sample = sampler.sample_ode(sampling_method="euler", num_steps=POINTS)
        if guidance == "unguided":
            return sample(batch.x, self.main.forward, y=batch.y)[-1]
        # a doubled batch for either kind of guidance, of which half is thrown away
        z = torch.cat([batch.x, batch.x])
        settings = {"y": torch.cat([batch.y, torch.full_like(batch.y, CLASSES)]), "cfg_scale": SCALE}
        # their first time is 1 + 1e-7 for this shift, by rounding, and would fall out of an interval that ends at 1
        settings["cfg_interval"] = (0.0, 1.1)
        if guidance == "CFG":
            return sample(z, self.main.forward_with_cfg, **settings)[-1].chunk(2)[0]
        settings["additional_model_forward"] = self.weak.forward
        return sample(z, self.main.forward_with_autoguidance, **settings)[-1].chunk(2)[0]

    @torch.no_grad()
    def encode(self, batch: Inputs) -> Tensor:
        return self.rae.encode(batch.images)

    @torch.no_grad()
    def decode(self, batch: Inputs) -> Tensor:
        return self.rae.decode(batch.x)


def save_weights(folder: Path, checkout: Path) -> None:
    """Weights for both sides, in the authors' names; what they initialise with zeros gets random numbers."""
    theirs = Theirs(folder, checkout, weights=False)
    torch.manual_seed(0)
    for name, module in (("main", theirs.main), ("weak", theirs.weak), ("decoder", theirs.build_decoder())):
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
        save_file(module.state_dict(), folder / f"{name}.safetensors")
