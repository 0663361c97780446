"""DiT and DiT-DH: sizes, geometry, precision, initialisation, the width rule. Parity with the authors' is elsewhere."""

import pytest
import torch

from rae.diffusion.dit import (
    DIT_SIZES,
    Attention,
    DiT,
    DiTConfig,
    DiTDH,
    DiTDHConfig,
    build,
    patchify,
    rotary_angles,
    sincos_table,
    unpatchify,
)

# DiT and DiT-DH on 16x16x768 latents with 1000 classes, as the authors' implementation counts them
PARAMETERS = {
    "S": (33_649_792, 196_455_764),
    "B": (131_884_288, 294_295_892),
    "L": (459_923_424, 621_744_436),
    "XL": (677_248_384, 838_675_796),
}

KINDS = {
    "dit": DiTConfig(in_channels=8, grid=(3, 4), width=16, heads=2, depth=2, num_classes=5),
    "dit-patch2": DiTConfig(in_channels=3, grid=(4, 6), patch_size=2, width=16, heads=2, depth=1, num_classes=5),
    "dit-dh": DiTDHConfig(
        in_channels=8, grid=(3, 4), width=16, heads=2, depth=2, head_width=24, head_heads=3, head_depth=1, num_classes=5
    ),
    "dit-dh-equal-widths": DiTDHConfig(
        in_channels=8, grid=(3, 4), width=16, heads=2, depth=1, head_width=16, head_heads=2, head_depth=1, num_classes=5
    ),
    "dit-dh-qk-norm": DiTDHConfig(
        in_channels=8, grid=(3, 4), width=16, heads=2, depth=1, head_width=16, head_heads=2, head_depth=1,
        num_classes=5, qk_norm=True,
    ),
    "unconditional": DiTConfig(in_channels=8, grid=(3, 4), width=16, heads=2, depth=1, num_classes=0),
}  # fmt: skip


def awake(config: DiTConfig) -> DiT:
    """A network with every parameter away from the zeros of its initialisation."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        network = build(config)
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return network


def inputs(config: DiTConfig, count: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, config.in_channels, *config.grid, generator=generator)
    t = torch.rand(count, generator=generator)
    return x, t, torch.arange(count) % (config.num_classes + 1)


every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


# --- sizes and initialisation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", PARAMETERS)
def test_published_parameter_counts(size):
    latents = {"in_channels": 768, "grid": (16, 16), "num_classes": 1000}
    with torch.device("meta"):
        dit = build(DiTConfig.of_size(size, **latents, allow_narrow=True))
        dit_dh = build(DiTDHConfig.of_size(size, **latents))
    assert tuple(sum(p.numel() for p in m.parameters()) for m in (dit, dit_dh)) == PARAMETERS[size]


@pytest.mark.parametrize("size", DIT_SIZES)
def test_every_size_builds(size):
    with torch.device("meta"):
        network = build(DiTDHConfig.of_size(size, in_channels=768, grid=(16, 16), num_classes=1000))
    assert (network.config.width, network.config.heads, len(network.blocks)) == DIT_SIZES[size]
    assert len(network.head_blocks) == 2


def test_unknown_size_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'XS'.* S, B, L, XL, XXL, H, G, T"):
        DiTConfig.of_size("XS", in_channels=8, grid=(2, 2), num_classes=1)


@every_kind
def test_fresh_model_puts_out_exactly_zero(config):
    network = build(config)
    assert torch.count_nonzero(network(*inputs(config))) == 0
    assert torch.count_nonzero(network(*inputs(config), dtype=torch.bfloat16)) == 0


def test_build_follows_the_kind():
    assert type(build(KINDS["dit"])) is DiT
    assert type(build(KINDS["dit-dh"])) is DiTDH


@every_kind
def test_parameter_groups_hold_every_parameter_once(config):
    network = build(config)
    groups = network.parameter_groups()
    names = [name for group in groups.values() for name, _ in group]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())
    assert all(network.get_parameter(name) is p for group in groups.values() for name, p in group)
    assert groups["matrices"]
    assert all(p.ndim == 2 for _, p in groups["matrices"])
    outside = ("embed", "head_embed", "position", "labels", "time", "final", "head_condition")
    assert not [name for name, _ in groups["matrices"] if name.split(".")[0] in outside]


@every_kind
def test_every_parameter_is_trained(config):
    network = awake(config)
    network(*inputs(config)).square().mean().backward()
    without = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert not without


# --- geometry --------------------------------------------------------------------------------------------------------


def test_patchify_order():
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(tokens[:, 3 * row + column], patch.flatten(1))  # channel, row, column


@pytest.mark.parametrize("p", [1, 2, 3])
def test_unpatchify_inverts_patchify_up_to_the_order_of_features(p):
    x = torch.randn(2, 5, 6, 12, generator=torch.Generator().manual_seed(0))
    tokens = patchify(x, p).unflatten(2, (5, p, p)).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(unpatchify(tokens, (6 // p, 12 // p), p), x)


def test_position_table_on_a_rectangle():
    """Token (r, c) of an h x w grid: the columns' half depends on c alone, the rows' half on r alone."""
    h, w, width = 3, 5, 24
    table = sincos_table((h, w), width).unflatten(0, (h, w))
    columns, rows = table.chunk(2, dim=-1)
    assert torch.equal(columns, columns[:1].expand(h, -1, -1))
    assert torch.equal(rows, rows[:, :1].expand(-1, w, -1))
    k = 1.0 / 10000 ** (torch.arange(6) / 6)
    torch.testing.assert_close(columns[0, 4], torch.cat([(4 * k).sin(), (4 * k).cos()]))
    torch.testing.assert_close(rows[2, 0], torch.cat([(2 * k).sin(), (2 * k).cos()]))


def test_rotary_angles_on_a_rectangle():
    h, w = 3, 5
    rows, columns = rotary_angles((h, w), 16).unflatten(0, (h, w)).chunk(2, dim=-1)
    k = 1.0 / 10000 ** (torch.arange(4, dtype=torch.float64) / 4)
    for r in range(h):
        for c in range(w):
            torch.testing.assert_close(rows[r, c], r * k)
            torch.testing.assert_close(columns[r, c], c * k)


def test_attention_sees_only_relative_positions_of_rows_and_of_columns(monkeypatch):
    """What rotary embedding is for: equal offsets give equal scores, and (1, 0) is another offset than (0, 1)."""
    h, w, seen = 3, 4, {}

    def record(q, k, v):
        seen["scores"] = (q @ k.transpose(-1, -2))[0, 0].unflatten(1, (h, w)).unflatten(0, (h, w))
        return v

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    rotation = torch.exp(1j * rotary_angles((h, w), 8)[:, None]).to(torch.complex64)
    # equal contents, so that only positions tell tokens apart
    Attention(8, 1, qk_norm=False)(torch.ones(1, h * w, 8), rotation)
    scores = seen["scores"]
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[1, 1, 2, 3])
    torch.testing.assert_close(scores[0, 1, 2, 0], scores[0, 2, 2, 1])
    assert not torch.isclose(scores[0, 0, 1, 0], scores[0, 0, 0, 1])


@every_kind
def test_rectangular_grids_keep_rows_and_columns_apart(config):
    """A change of one latent pixel changes the output there most, in a network that hardly mixes tokens."""
    network = awake(config)
    with torch.no_grad():
        for block in [*network.blocks, *getattr(network, "head_blocks", [])]:
            block.attn.proj.weight.zero_()
    x, t, y = inputs(config, count=1)
    changed = x.clone()
    row, column = config.grid[0] - 1, config.grid[1] - 2
    changed[0, :, row, column] += 1
    with torch.no_grad():
        difference = (network(changed, t, y) - network(x, t, y)).abs().amax(dim=(0, 1))
    assert difference.shape == config.grid
    p = config.patch_size
    moved = difference.nonzero() // p
    assert (moved == torch.tensor([row // p, column // p])).all()
    assert len(moved) == p * p


def test_wrong_latents_are_refused_with_both_shapes():
    config = KINDS["dit"]
    network = build(config)
    x, t, y = inputs(config)
    with pytest.raises(ValueError, match=r"\(8, 4, 3\).*\(8, 3, 4\)"):
        network(x.transpose(2, 3), t, y)


# --- behaviour -------------------------------------------------------------------------------------------------------


@every_kind
def test_output_depends_on_latents_time_and_label(config):
    network = awake(config)
    x, t, y = inputs(config)
    with torch.no_grad():
        out = network(x, t, y)
        assert not torch.allclose(out, network(x + 0.1, t, y))
        assert not torch.allclose(out, network(x, t * 0.5, y))
        if config.num_classes:
            assert not torch.allclose(out, network(x, t, (y + 1) % 5))


@every_kind
def test_samples_do_not_see_each_other(config):
    network = awake(config)
    x, t, y = inputs(config, count=4)
    with torch.no_grad():
        together = network(x, t, y)
        alone = torch.cat([network(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@every_kind
def test_train_and_eval_are_the_same(config):
    network = awake(config)
    x, t, y = inputs(config)
    with torch.no_grad():
        assert torch.equal(network.train()(x, t, y), network.eval()(x, t, y))


@every_kind
def test_bfloat16_is_close_to_float32(config):
    network = awake(config)
    x, t, y = inputs(config, count=6)
    with torch.no_grad():
        exact, rounded = network(x, t, y), network(x, t, y, dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    # eight bits of mantissa, a few layers: percents; and not the same computation under another name
    error = (rounded - exact).square().mean().sqrt() / exact.std()
    assert 1e-4 < error < 0.05


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_activations_changes_no_gradient(config, dtype):
    gradients = []
    for recompute in (False, True):
        network = awake(config)
        network(*inputs(config), dtype=dtype, recompute=recompute).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


def test_recompute_keeps_less_for_the_backward_pass():
    config = DiTConfig(in_channels=8, grid=(4, 4), width=16, heads=2, depth=6, num_classes=5)
    kept = []
    for recompute in (False, True):
        network, total = awake(config), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, total=total: total.append(t.numel()) or t, lambda t: t):
            network(*inputs(config), recompute=recompute)
        kept.append(sum(total))
    assert kept[1] < kept[0] / 3


def test_gradient_against_finite_differences():
    """The loss falls along the negative gradient as the gradient says: forward and backward belong together."""
    config = KINDS["dit-dh"]
    network = awake(config)
    x, t, y = inputs(config)
    loss = network(x, t, y).square().mean()
    loss.backward()
    norm = sum(p.grad.square().sum() for p in network.parameters()).sqrt()
    step, losses = 1e-3, []
    for sign in (1, -2):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(p.grad / norm, alpha=sign * step)
            losses.append(network(x, t, y).square().mean())
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), norm, rtol=0.01, atol=0)


def test_qk_norm_makes_attention_blind_to_the_size_of_queries_and_keys():
    changes = []
    for config in (KINDS["dit-dh-qk-norm"], KINDS["dit-dh-equal-widths"]):
        network = awake(config)
        x, t, y = inputs(config)
        with torch.no_grad():
            before = network(x, t, y)
            for block in network.blocks:
                w = block.attn.qkv.weight.shape[1]
                block.attn.qkv.weight[: 2 * w] *= 10
                block.attn.qkv.bias[: 2 * w] *= 10
            changes.append((network(x, t, y) - before).abs().max())
    assert changes[0] < 1e-4 < 1e-2 < changes[1]


def test_null_label_is_the_last_row_of_the_table():
    for config in KINDS.values():
        network = build(config)
        assert network.null_label == config.num_classes
        assert len(network.labels.weight) == config.num_classes + 1


# --- configuration ---------------------------------------------------------------------------------------------------

WIDE = {"in_channels": 20, "grid": (2, 2), "heads": 2, "depth": 1, "num_classes": 3}


def test_width_rule_gives_the_bound_and_the_remedies():
    with pytest.raises(ValueError, match=r"width 16 .* 20 numbers.* 4 smallest .*= 0\.200 .*Theorem 1") as error:
        DiTConfig(width=16, **WIDE)
    assert "allow_narrow" in str(error.value)
    assert "DiT-DH" in str(error.value)


def test_width_rule_counts_the_numbers_of_a_patch():
    with pytest.raises(ValueError, match=r"width 16 .* 80 numbers"):
        DiTConfig(width=16, patch_size=2, **WIDE)


def test_width_rule_is_about_the_head_of_dit_dh():
    build(DiTDHConfig(width=16, head_width=32, head_heads=2, **WIDE))
    with pytest.raises(ValueError, match="width 16 "):
        DiTDHConfig(width=32, head_width=16, head_heads=2, **WIDE)


def test_a_model_as_wide_as_its_tokens_is_wide_enough():
    config = DiTConfig(width=24, **WIDE | {"in_channels": 24})
    assert config.output_width == config.token_dim == 24
    build(config)


def test_allow_narrow_builds_what_theorem_1_is_about():
    """All outputs of a narrow model lie in an affine space of `width` dimensions, whatever it has learnt."""
    config = DiTConfig(width=16, allow_narrow=True, **WIDE)
    network = awake(config)
    with torch.no_grad():
        tokens = patchify(network(*inputs(config, count=50)), 1).flatten(0, 1).double()
    assert torch.linalg.matrix_rank(tokens - tokens.mean(0), rtol=1e-5) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "width 16 with 3 heads.*multiple of 4"),
        ({"heads": 8}, "width 16 with 8 heads.*head dimension .here 2.*multiple of 4"),
        ({"grid": (3, 4), "patch_size": 2}, r"grid \(3, 4\).*patch_size 2"),
        ({"grid": (0, 4)}, r"grid \(0, 4\)"),
        ({"num_classes": -1}, "num_classes"),
        ({"depht": 3}, "depht"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**{"in_channels": 4, "grid": (4, 4), "width": 16, "heads": 2, "depth": 1, "num_classes": 3} | change)
