"""What a pass costs, in closed form: parameters and operations of every network here, from its shape alone.

    linear layer, n places of i -> o numbers       n i o multiply-adds
    attention of n tokens, w wide                  2 n^2 w      (q k^T, and that times v)

An image at a time; nothing is downloaded, allocated or run. arXiv 2510.11690 does not say how it counts, so a `Cost`
keeps apart what conventions of the field count or leave out.
"""

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from rae.autoencoder.decoder import DecoderConfig
from rae.autoencoder.encoders import EncoderConfig, describe_encoder
from rae.autoencoder.families import ENCODERS, FAMILIES
from rae.diffusion.dit import DiTConfig, DiTDHConfig
from rae.evaluation.lpips import WIDTHS
from rae.sources import WHEEL_CONFIG, SourceError, fetch, source_of


@dataclass(frozen=True)
class Cost:
    """Of a network, and of its forward pass over one image.

    Attributes:
        parameters: numbers that it is made of; position tables are among them, rotary ones are not.
        linear: multiply-adds of linear layers and convolutions.
        attention: multiply-adds of q k^T and of attention times v.
        pointwise: one for each bias added, two for each number that a layer or group norm puts out.
    """

    parameters: int = 0
    linear: int = 0
    attention: int = 0
    pointwise: int = 0

    @property
    def macs(self) -> int:
        """linear + attention: multiply-adds of matrix products."""
        return self.linear + self.attention

    @property
    def flops(self) -> int:
        """2 (linear + attention): what the peaks of devices are quoted in, and what all estimates here are made of."""
        return 2 * self.macs

    @property
    def counted(self) -> int:
        """linear + pointwise, a multiply-add as one: what gives Table 1b to its last digit."""
        return self.linear + self.pointwise

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def __mul__(self, times: int) -> "Cost":
        return Cost(*(times * count for count in astuple(self)))


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


# --- layers ----------------------------------------------------------------------------------------------------------


def linear(inputs: int, outputs: int, places: int, *, bias: bool = True) -> Cost:
    """places x inputs x outputs multiply-adds; a convolution's inputs are the numbers under its kernel."""
    return Cost((inputs + bias) * outputs, inputs * outputs * places, 0, bias * outputs * places)


def attention(tokens: int, width: int) -> Cost:
    """2 tokens^2 width multiply-adds, however many heads; the linear layers around it are not in it."""
    return Cost(attention=2 * tokens**2 * width)


def norm(channels: int, places: int) -> Cost:
    """A layer or group norm with scale and shift."""
    return Cost(2 * channels, pointwise=2 * channels * places)


# --- our networks ----------------------------------------------------------------------------------------------------


def decoder(config: DecoderConfig) -> Cost:
    """The ViT decoder: its blocks see one token more than there are patches."""
    patches, width = math.prod(config.grid), config.width
    tokens = 1 + patches
    block = norm(width, tokens) * 2 + linear(width, 3 * width, tokens) + linear(width, width, tokens)
    block += linear(width, config.mlp_width, tokens) + linear(config.mlp_width, width, tokens)
    ends = linear(config.latent_channels, width, patches) + linear(width, 3 * config.patch_size**2, patches)
    tables = Cost((1 + tokens) * width)  # class token, positions
    return tables + ends + norm(width, patches) + (block + attention(tokens, width)) * config.depth


def dit(config: DiTConfig) -> dict[str, Cost]:
    """A DiT, or the trunk and the head of a DiT-DH; whatever makes the output is the head's."""
    tokens, width, n = math.prod(config.token_grid), config.width, config.token_dim
    embeddings = Cost((tokens + config.num_classes + 1) * width + 256)  # positions, labels, frequencies of time
    trunk = embeddings + linear(512, width, 1) + linear(width, width, 1) + linear(n, width, tokens)
    trunk += dit_blocks(config, width, config.heads, config.depth, conditions=1)
    if not isinstance(config, DiTDHConfig):
        return {"DiT": trunk + _output(width, n, tokens, conditions=1)}
    wide = config.head_width
    head = linear(n, wide, tokens) + dit_blocks(config, wide, config.head_heads, config.head_depth, conditions=tokens)
    if width != wide:
        head += linear(width, wide, tokens)
    return {"DiT-DH trunk": trunk, "DiT-DH head": head + _output(wide, n, tokens, conditions=tokens)}


def dit_blocks(config: DiTConfig, width: int, heads: int, depth: int, *, conditions: int) -> Cost:
    """The blocks alone: SwiGLU, RMSNorm, and a modulation that is computed `conditions` times, once or per token."""
    tokens, hidden = math.prod(config.token_grid), int(2 / 3 * int(config.mlp_ratio * width))
    norms = Cost(2 * width + 2 * (width // heads) * config.qk_norm)
    mlp = linear(width, 2 * hidden, tokens) + linear(hidden, width, tokens)
    attend = linear(width, 3 * width, tokens) + attention(tokens, width) + linear(width, width, tokens)
    return (norms + attend + mlp + linear(width, 6 * width, conditions)) * depth


def _output(width: int, outputs: int, tokens: int, *, conditions: int) -> Cost:
    return Cost(width) + linear(width, 2 * width, conditions) + linear(width, outputs, tokens)


# --- the networks that judge in stage 1 ------------------------------------------------------------------------------


def lpips(size: tuple[int, int]) -> Cost:
    """VGG16's convolutions over one image, without the few weights of LPIPS itself."""
    widths = [(stage, width) for stage, width in enumerate(WIDTHS) for _ in range((2, 2, 3, 3, 3)[stage])]
    inputs = [3, *(width for _, width in widths)]
    places = [(size[0] >> stage) * (size[1] >> stage) for stage, _ in widths]
    return total(linear(9 * i, o, n) for i, (_, o), n in zip(inputs, widths, places))


def discriminator_heads(config: EncoderConfig, depths: Sequence[int], kernel: int) -> Cost:
    """What is trained on the tokens of a frozen network: one head for each depth, and one more for the last block."""
    tokens, width = math.prod(config.input_size) // config.patch_size**2, config.width
    head = linear(width, width, tokens) + linear(kernel * width, width, tokens) + linear(width, 1, tokens)
    norms = Cost(4 * width)
    return (head + norms) * (1 + len(depths))


# --- networks of others ----------------------------------------------------------------------------------------------

# What a row of ENCODERS does not tell of the published network; width, depth, heads and patch size are the row's.
_LAYOUTS = {
    "dinov2": {"model_type": "dinov2", "image_size": 518},
    "siglip2": {"model_type": "siglip_vision_model", "image_size": 256},
    "mae": {"model_type": "vit_mae", "image_size": 224},
    "dino": {"model_type": "vit", "image_size": 224},
    "dinov3": {"model_type": "dinov3_vit", "image_size": 224, "num_register_tokens": 4},
}
_EXCEPTIONS = {
    "dinov2-giant": {"use_swiglu_ffn": True},
    "dinov2-giant-reg": {"use_swiglu_ffn": True},
    "siglip2-so400m": {"intermediate_size": 4304},
    "dinov3-huge": {"use_gated_mlp": True},
}


def encoder(name: str, **settings: Any) -> tuple[EncoderConfig, Cost]:
    """A vision transformer of transformers: every linear layer sees every token, the convolution every patch.

    Args:
        name: a row of `ENCODERS` or its hub id: known, nothing is downloaded; or another hub id, or a folder.
        settings: those of `describe_encoder`.

    Returns:
        What it is, and its cost; of the parameters, also those that an `Encoder` leaves unused.

    Raises:
        SourceError: unknown, or its configuration cannot be had.
        ValueError: sizes that do not fit the patch size.
    """
    rows = {row.source.removeprefix("hub:"): row_name for row_name, row in ENCODERS.items()}
    name = rows.get(name.removeprefix("hub:"), name)
    with tempfile.TemporaryDirectory() as temporary:
        if name in ENCODERS:
            folder = Path(temporary)
            _layout(name).save_pretrained(folder)
        else:
            folder = fetch(source_of(name), weights=False)
        config = describe_encoder(name, folder=folder, **settings)
        family, model = FAMILIES[config.family], _model_class(config.family)
        layout, others = model.config_class.from_pretrained(folder, return_unused_kwargs=True, **family.settings)
    with torch.device("meta"):
        network = model(layout, **others)
    patches = math.prod(config.input_size) // config.patch_size**2
    tokens = config.prefix_tokens + patches
    layers = total(_layer(module, tokens, patches) for module in network.modules())
    layers += attention(tokens, config.width) * config.depth
    kept = sum(parameter.numel() for parameter in network.parameters())
    return config, layers + Cost(kept - layers.parameters)


def _layer(module: nn.Module, tokens: int, patches: int) -> Cost:
    if isinstance(module, nn.Linear):
        return linear(module.in_features, module.out_features, tokens, bias=module.bias is not None)
    if isinstance(module, nn.Conv2d):
        inputs = module.in_channels * math.prod(module.kernel_size)
        return linear(inputs, module.out_channels, patches, bias=module.bias is not None)
    return norm(module.normalized_shape[0], tokens) if isinstance(module, nn.LayerNorm) else Cost()


def _layout(name: str) -> Any:
    """The configuration, of transformers, of a row of `ENCODERS`."""
    row, word = ENCODERS[name], name.partition("-")[0]
    if row.source.startswith("wheel:"):
        return _model_class("dinov2").config_class(**WHEEL_CONFIG)
    layout = _LAYOUTS[word] | _EXCEPTIONS.get(name, {})
    kind = layout.pop("model_type") + ("_with_registers" if name.endswith("-reg") else "")
    layout |= {"hidden_size": row.width, "num_hidden_layers": row.depth, "num_attention_heads": row.heads}
    if word != "dinov2":  # whose MLP is 4 times as wide by itself
        layout.setdefault("intermediate_size", 4 * row.width)
    return _model_class(kind).config_class(patch_size=row.patch_size, **layout)


def _model_class(family: str) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[family].model)


# config.json of stabilityai/sd-vae-ft-ema and -mse, whose decoders differ in their weights alone
SD_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}


def sd_vae(config: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Cost]:
    """Encoder and decoder of diffusers' `AutoencoderKL`, each with its 1 x 1 convolution.

    Args:
        config: its `config.json`.
        size: (H, W) of the images.

    Raises:
        SourceError: blocks of another kind than SD-VAE's.
    """
    kinds = {*config["down_block_types"], *config["up_block_types"]} - {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    if kinds:
        raise SourceError(f"a VAE with {', '.join(sorted(kinds))} is not of SD-VAE's kind, the only one counted here.")
    widths, layers, latents = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    places = [(size[0] >> stage) * (size[1] >> stage) for stage in range(len(widths))]
    wide, few = widths[-1], places[-1]
    middle = _resnet(wide, wide, few) * 2 + norm(wide, few) + linear(wide, wide, few) * 4 + attention(few, wide)

    down, before = linear(9 * 3, widths[0], places[0]), widths[0]
    for stage, width in enumerate(widths):
        down += _resnet(before, width, places[stage]) + _resnet(width, width, places[stage]) * (layers - 1)
        if stage + 1 < len(widths):
            down += linear(9 * width, width, places[stage + 1])
        before = width
    moments = norm(wide, few) + linear(9 * wide, 2 * latents, few) + linear(2 * latents, 2 * latents, few)

    up, before = linear(latents, latents, few) + linear(9 * latents, wide, few), wide
    for stage, width in reversed([*enumerate(widths)]):
        up += _resnet(before, width, places[stage]) + _resnet(width, width, places[stage]) * layers
        if stage:
            up += linear(9 * width, width, places[stage - 1])
        before = width
    image = norm(widths[0], places[0]) + linear(9 * widths[0], 3, places[0])
    return {"SD-VAE encoder": down + middle + moments, "SD-VAE decoder": up + middle + image}


def _resnet(inputs: int, outputs: int, places: int) -> Cost:
    shortcut = linear(inputs, outputs, places) if inputs != outputs else Cost()
    norms = norm(inputs, places) + norm(outputs, places)
    return norms + linear(9 * inputs, outputs, places) + linear(9 * outputs, outputs, places) + shortcut


# --- what is published -----------------------------------------------------------------------------------------------

_EPOCH = 1_281_167  # ImageNet's training images


class Published(NamedTuple):
    """A figure of arXiv 2510.11690, and the same counted here.

    Attributes:
        where: table, figure or section.
        what: the network.
        printed: as it stands there.
        counted: ours, at the precision that is printed.
        by: what is counted, and how it is rounded.
    """

    where: str
    what: str
    printed: str
    counted: str
    by: str


def published() -> list[Published]:
    """Every GFLOPs figure of the paper, by the convention that comes nearest; not all are met."""
    shape = {"latent_channels": 768, "patch_size": 16, "grid": (16, 16)}
    decoders = {name: decoder(DecoderConfig.of_size(name, **shape)) for name in ("ViT-B", "ViT-L", "ViT-XL")}
    vae = sd_vae(SD_VAE, (256, 256))
    _, dinov2 = encoder("dinov2-base-reg", image_size=256)
    latents = {"in_channels": 768, "grid": (16, 16), "num_classes": 1000}
    xl, dh_b, dh_xl = (
        total(dit(config.of_size(size, **latents)).values())
        for config, size in ((DiTConfig, "XL"), (DiTDHConfig, "B"), (DiTDHConfig, "XL"))
    )
    small = total(dit(DiTConfig.of_size("XL", **latents | {"in_channels": 384})).values())
    counting = "multiply-adds without attention's, biases, 2 for a normed number"
    rows = [
        Published("Table 1b", f"decoder {name}, GFLOPs", printed, f"{cost.counted / 1e9:.1f}", counting)
        for (name, cost), printed in zip((decoders | {"SD-VAE": vae["SD-VAE decoder"]}).items(), _TABLE_1B)
    ]
    figure_2 = {"encoder DINOv2-B": dinov2, "decoder ViT-XL": decoders["ViT-XL"], **vae}
    rows += [
        Published("Figure 2", f"{name}, GFLOPs", printed, f"{cost.counted // 10**9}", "the same, digits cut off")
        for (name, cost), printed in zip(figure_2.items(), ("22", "106", "135", "310"))
    ]
    sd = vae["SD-VAE decoder"].counted
    rows += [
        Published("Sec. 3", "decoder SD-VAE to ViT-B", "14", f"{sd / decoders['ViT-B'].counted:.0f}", "as Table 1b"),
        Published("Table 8", "DiT-XL on DINOv2-S, M parameters", "676", f"{small.parameters / 1e6:.0f}", "all"),
        Published("Table 8", "DiT-DH-XL, M parameters", "839", f"{dh_xl.parameters / 1e6:.0f}", "all"),
    ]
    for epochs, printed in ((80, "5e10"), (800, "5e11")):
        work = f"{3 * dh_xl.macs * _EPOCH * epochs / 1e9:.0e}".replace("+", "")
        by = f"multiply-adds with attention's, thrice, {epochs} epochs"
        rows.append(Published("Sec. 5", "training of DiT-DH-XL, GFLOPs", printed, work, by))
    share = f"{dh_b.macs / xl.macs:.0%}"
    rows.append(Published("Sec. 5", "training of DiT-DH-B to DiT-XL", "40%", share, "multiply-adds, as many epochs"))
    heads = (1152, 16, 6), (2048, 16, 4), (2048, 16, 2)
    config = DiTDHConfig.of_size("XL", **latents)
    for width, count, depth in heads:
        head = dit_blocks(config, width, count, depth, conditions=256)
        told = "not at hand" if depth == 4 else "similar GFLOPs"
        what = f"head of {depth} blocks, {width} wide, GFLOPs"
        rows.append(Published("Table 16", what, told, f"{head.flops / 1e9:.0f}", "blocks alone, 2 for a multiply-add"))
    return rows


_TABLE_1B = ("22.2", "78.1", "106.7", "310.4")
