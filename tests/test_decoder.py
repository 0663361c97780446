"""The decoder against closed forms: patches, positions, attention written out, precision, checkpointing."""

import math

import pytest
import torch
import torch.nn.functional as F

from rae.autoencoder.decoder import DECODERS, Block, Decoder, DecoderConfig, patchify, position_table, unpatchify
from rae.config import ConfigError, parse

CONFIG = DecoderConfig(latent_channels=12, width=32, depth=2, heads=4, mlp_width=48, patch_size=4, grid=(2, 3))


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoder(config: DecoderConfig = CONFIG) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config)
    for parameter in model.parameters():  # nothing at its special starting value
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def test_patchify_and_unpatchify_are_inverse_on_a_rectangle():
    images = seeded(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(unpatchify(patches, (2, 3), 4), images)


def test_patch_features_are_row_column_channel():
    patches = torch.zeros(1, 6, 48)
    patches[0, 4, (1 * 4 + 2) * 3 + 0] = 1.0  # token (1, 1), row 1, column 2, red
    image = unpatchify(patches, (2, 3), 4)
    assert image.nonzero().tolist() == [[0, 0, 4 + 1, 4 + 2]]


def test_position_table_is_columns_then_rows():
    table = position_table(8, (2, 3))
    assert table.shape == (7, 8)
    assert torch.equal(table[0], torch.zeros(8))
    row, column, slow = 1, 2, 10000**-0.5
    expected = [f(k * w) for k in (column, row) for f in (math.sin, math.cos) for w in (1, slow)]
    torch.testing.assert_close(table[1 + row * 3 + column], torch.tensor(expected))


def test_block_equals_attention_written_out():
    model = decoder().double()
    block, x = model.blocks[0], seeded(2, 5, 32).double()
    y = F.layer_norm(x, (32,), block.norm1.weight, block.norm1.bias, 1e-12)
    q, k, v = (y @ block.qkv.weight.T + block.qkv.bias).chunk(3, dim=-1)
    heads = []
    for h in range(4):
        s = slice(8 * h, 8 * h + 8)
        weights = (q[..., s] @ k[..., s].transpose(1, 2) / math.sqrt(8)).softmax(dim=-1)
        heads.append(weights @ v[..., s])
    z = x + torch.cat(heads, dim=-1) @ block.out.weight.T + block.out.bias
    y = F.layer_norm(z, (32,), block.norm2.weight, block.norm2.bias, 1e-12) @ block.up.weight.T + block.up.bias
    gelu = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    expected = z + gelu @ block.down.weight.T + block.down.bias
    torch.testing.assert_close(block(x, torch.float64), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("patch_size", [4, 8])
def test_larger_patch_gives_larger_image(patch_size):
    config = CONFIG.model_copy(update={"patch_size": patch_size})
    image = Decoder(config)(seeded(2, 6, 12))
    assert image.shape == (2, 3, 2 * patch_size, 3 * patch_size) == (2, 3, *config.output_size)


def test_positions_make_the_difference_between_equal_tokens():
    patches = decoder().patches(seeded(1, 1, 12).expand(1, 6, 12))
    assert (patches[0, 1:] - patches[0, :-1]).abs().amax(dim=-1).min() > 1e-3


def test_tokens_of_another_grid_are_resized_after_the_embedding():
    # Tokens that repeat a 2 x 3 grid in blocks of 2 x 2: half-pixel bilinear halving averages each block.
    small = seeded(1, 6, 12)
    large = small.view(1, 2, 3, 12).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).reshape(1, 24, 12)
    model = decoder()
    torch.testing.assert_close(model(large, grid=(4, 6)), model(small))
    with pytest.raises(ValueError, match=r"\[1, 24, 12\] given to a decoder of \[B, 2\*3, 12\]"):
        model(large)


def test_train_and_eval_are_equal():
    model, tokens = decoder(), seeded(2, 6, 12)
    assert torch.equal(model.train()(tokens), model.eval()(tokens))


def test_checkpointing_changes_no_gradient():
    tokens, gradients = seeded(2, 6, 12), []
    for checkpointing in (False, True):
        model = decoder()
        model(tokens, recompute=checkpointing).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bfloat16_computes_in_bfloat16_and_returns_float32(monkeypatch):
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b: seen.append((x.dtype, w.dtype, b.dtype)) or linear(x, w, b))
    model, tokens = decoder(), seeded(2, 6, 12)
    low = model(tokens, dtype=torch.bfloat16)
    assert set(seen) == {(torch.bfloat16,) * 3}
    assert low.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    error = (low - model(tokens)).square().mean().sqrt() / model(tokens).std()
    assert 1e-4 < error < 0.03


def test_published_sizes_have_the_published_parameter_counts():
    counts = {"ViT-B": 86_435_328, "ViT-L": 304_150_272, "ViT-XL": 415_352_704}
    for size, count in counts.items():
        config = DecoderConfig.of_size(size, latent_channels=768, patch_size=16, grid=(16, 16))
        with torch.device("meta"):
            assert sum(parameter.numel() for parameter in Decoder(config).parameters()) == count


def test_every_size_is_a_valid_configuration():
    for size in DECODERS:
        with torch.device("meta"):
            Block(DecoderConfig.of_size(size, latent_channels=384, patch_size=16, grid=(4, 4)))
    with pytest.raises(ValueError, match="no decoder size 'ViT-G'; there are ViT-Ti, ViT-S"):
        DecoderConfig.of_size("ViT-G", latent_channels=384, patch_size=16, grid=(4, 4))


def test_impossible_widths_are_refused():
    good = CONFIG.model_dump()
    with pytest.raises(ConfigError, match="width 30 is not a multiple of its 4 heads"):
        parse(DecoderConfig, good | {"width": 30}, "recipe")
    with pytest.raises(ConfigError, match="width 30 is not a multiple of 4"):
        parse(DecoderConfig, good | {"width": 30, "heads": 3}, "recipe")


# --- starting from another decoder


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def test_start_from_the_same_shape_copies_every_weight():
    source, model = decoder(), Decoder(CONFIG)
    assert model.start_from(source) == []
    tokens = seeded(2, 6, 12)
    expected = source(tokens)
    assert torch.equal(model(tokens), expected)
    for parameter in source.parameters():
        parameter.data.zero_()
    assert torch.equal(model(tokens), expected)  # copied, not shared
    assert all(parameter.requires_grad for parameter in model.parameters())


def cubic(s: float, a: float = -0.75) -> float:
    """Keys' kernel of cubic convolution."""
    s = abs(s)
    if s <= 1:
        return (a + 2) * s**3 - (a + 3) * s**2 + 1
    return a * (s**3 - 5 * s**2 + 8 * s - 4) if s < 2 else 0.0


@pytest.mark.parametrize("axis", [0, 1])
def test_start_from_another_grid_resizes_the_positions(axis):
    def along(length: int) -> tuple[int, int]:
        return (length, 1) if axis == 0 else (1, length)

    source = decoder(CONFIG.model_copy(update={"grid": along(8)}))
    source.positions.data[0, 1:] = 0
    source.positions.data[0, 1 + 4] = value = seeded(32)  # of the fifth token of eight
    model = Decoder(CONFIG.model_copy(update={"grid": along(16)}))
    assert model.start_from(source) == [f"positions are resized: {along(8)} -> {along(16)} tokens"]
    # the centre of token j of 16 lies at (j + 1/2) / 2 - 1/2 of 8
    expected = torch.tensor([cubic(j / 2 - 0.25 - 4) for j in range(16)])[:, None] * value
    torch.testing.assert_close(model.positions[0, 1:], expected, rtol=1e-5, atol=1e-6)
    assert equal(model.positions[0, 0], source.positions[0, 0])
    for name, parameter in source.named_parameters():
        assert name == "positions" or equal(model.get_parameter(name), parameter)


@pytest.mark.parametrize(
    ("change", "said", "anew"),
    [
        ({"latent_channels": 8}, "the embedding begins anew: 12 -> 8 channels", "embed.weight"),
        ({"patch_size": 8}, "the last layer begins anew: patches of 4 -> 8 pixels", "head."),
    ],
)
def test_start_from_what_fits_only_in_part(change, said, anew):
    config = CONFIG.model_copy(update=change)
    source = decoder()
    torch.manual_seed(5)
    model = Decoder(config)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.start_from(source) == [said]
    for name, value in model.state_dict().items():
        assert equal(value, fresh[name] if name.startswith(anew) else source.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 16}, r"width 16 cannot start from one of 32; take decoder\.size=\[32,2,4,48\]"),
        ({"depth": 3}, "depth 3 cannot start from one of 2"),
        ({"heads": 8}, "heads 8 cannot start from one of 4"),
        ({"mlp_width": 64}, "mlp_width 64 cannot start from one of 48"),
    ],
)
def test_start_from_other_blocks_is_refused(change, message):
    model = Decoder(CONFIG.model_copy(update=change))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.start_from(decoder())
    assert all(equal(value, before[name]) for name, value in model.state_dict().items())
