"""Reading files in the authors' layout.

The published files are gigabytes and are not here; these are written by `torch.save` in the layout of the authors'
scripts, from the small weights under tests/golden, whose key names are the published ones.
"""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rae.diffusion.flow import Flow
from rae.interop.official import (
    DECODER_KEYS,
    DITDH_KEYS,
    ConversionError,
    convert_decoder,
    convert_stage2,
    read_file,
    read_statistics,
    running_statistics,
)

GOLDEN = Path(__file__).parent / "golden"
FLOW = Flow(shift=2.0)


@pytest.fixture
def decoder_weights():
    return load_file(GOLDEN / "rae_decode" / "weights.safetensors")


@pytest.fixture
def ditdh_weights():
    return load_file(GOLDEN / "ditdh_qknorm" / "weights.safetensors")


@pytest.fixture
def save(tmp_path):
    def write(content, name="model.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- decoder ---------------------------------------------------------------------------------------------------------


def test_decoder_sizes_come_from_the_shapes(save, decoder_weights):
    decoder = convert_decoder(save(decoder_weights), heads=3)
    config = decoder.config
    assert (config.latent_channels, config.width, config.depth, config.mlp_width) == (40, 48, 2, 192)
    assert (config.patch_size, config.grid, config.norm_eps) == (8, (4, 4), 1e-12)
    _, key, value = decoder.blocks[1].qkv.weight.chunk(3)
    assert torch.equal(key, decoder_weights["decoder_layers.1.attention.attention.key.weight"])
    assert torch.equal(value, decoder_weights["decoder_layers.1.attention.attention.value.weight"])
    assert not any(p.requires_grad for p in decoder.parameters())


def test_a_training_checkpoint_holds_two_decoders_and_ema_is_the_default(save, decoder_weights):
    def checkpoint(scale, prefix):
        weights = {f"{prefix}decoder.{key}": scale * value for key, value in decoder_weights.items()}
        return weights | {f"{prefix}encoder.encoder.embeddings.cls_token": torch.zeros(1, 1, 40)}

    step = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    content = {"step": 7, "model": checkpoint(1, "module._orig_mod."), "ema": checkpoint(2, "")}
    path = save(content | {"optimizer": step.state_dict(), "scheduler": None}, "ep-0000001.pt")
    online, ema = (convert_decoder(path, heads=3, weights=which) for which in ("model", "ema"))
    assert equal(online, convert_decoder(save(decoder_weights), heads=3))
    assert torch.equal(ema.positions, 2 * online.positions)
    assert equal(ema, convert_decoder(path, heads=3))


def test_half_precision_files_become_float32(save, decoder_weights):
    decoder = convert_decoder(save({key: value.bfloat16() for key, value in decoder_weights.items()}), heads=3)
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}


def test_what_the_weights_do_not_tell_is_asked_for(save, decoder_weights):
    with pytest.raises(ConversionError, match=r"width 48, 2 layers and MLP width 192.*give heads="):
        convert_decoder(save(decoder_weights))


def test_missing_unexpected_and_misshapen_keys_are_named(save, decoder_weights):
    def convert(**changes):
        changed = {key: value for key, value in (decoder_weights | changes).items() if value is not None}
        return convert_decoder(save(changed), heads=3)

    with pytest.raises(ConversionError, match=r"1 keys missing \(trainable_cls_token\), 0 unexpected \(none\)"):
        convert(trainable_cls_token=None)
    with pytest.raises(ConversionError, match=r"1 unexpected \(lpips\)"):
        convert(lpips=torch.zeros(1))
    with pytest.raises(ConversionError, match=r"1 tensors of other shapes: decoder_norm.weight \[47\] where \[48\]"):
        convert(**{"decoder_norm.weight": torch.ones(47)})
    with pytest.raises(ConversionError, match=r"attention.key.bias \[47\] where \[48\]"):
        convert(**{"decoder_layers.0.attention.attention.key.bias": torch.ones(47)})
    with pytest.raises(ConversionError, match=r"decoder_embed.weight \[48\] should have 2 axes"):
        convert(**{"decoder_embed.weight": torch.ones(48)})
    with pytest.raises(ConversionError, match=r"has no 'decoder_embed.weight', but"):
        convert(**{"decoder_embed.weight": None})
    with pytest.raises(ConversionError, match="12 tokens are not a square grid"):
        convert(decoder_pos_embed=torch.zeros(1, 13, 48))
    for content in ({"model": decoder_weights}, {"model": decoder_weights, "ema": None}):
        with pytest.raises(ConversionError, match=r"no 'ema' weights; it has 'model'\. Take those: --weights model"):
            convert_decoder(save(content), heads=3)
    with pytest.raises(ConversionError, match=r"no 'model' weights; it has 'ema', 'step'\. .*--weights ema"):
        convert_decoder(save({"ema": decoder_weights, "step": 3}), heads=3, weights="model")
    with pytest.raises(ConversionError, match=r"no 'ema' weights; it has 'model'\.$"):
        convert_decoder(save({"model": torch.zeros(2), "ema": None}), heads=3)
    with pytest.raises(ConversionError, match="0 in the state dict are no tensors with names"):
        convert_decoder(save({0: torch.zeros(2)}), heads=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(save, decoder_weights, ditdh_weights, value):
    decoder_weights["decoder_layers.0.attention.attention.key.weight"][3, 5] = value
    with pytest.raises(ConversionError, match=r"1 tensors hold .* not finite: decoder_layers\.0\.att.*\.key\.weight"):
        convert_decoder(save(decoder_weights), heads=3)
    ditdh_weights["dec_feat_rope.freqs_sin"][0, 0] = value
    with pytest.raises(ConversionError, match=r"dec_feat_rope\.freqs_sin .* is not the rotary table"):
        convert_stage2(save(ditdh_weights), flow=FLOW)


def test_files_of_an_older_torch_are_read(tmp_path, decoder_weights):
    torch.save(decoder_weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(decoder_weights, tmp_path / "new.pt")
    assert equal(*(convert_decoder(tmp_path / name, heads=3) for name in ("old.pt", "new.pt")))
    whole = (tmp_path / "old.pt").read_bytes()
    for count in (0, 1, 10, 100, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:count])
        with pytest.raises(ConversionError, match=r"cut\.pt"):
            read_file(tmp_path / "cut.pt")


# --- stage 2 ---------------------------------------------------------------------------------------------------------


def test_ditdh_sizes_come_from_shapes_and_rotary_tables(save, ditdh_weights, tmp_path):
    path = save({"model": ditdh_weights, "ema": ditdh_weights, "optimizer": {}})
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij"))
    model = convert_stage2(path, flow=FLOW, class_names=tmp_path / "names.txt")
    assert model.config.class_names == tuple("abcdefghij")
    config = model.config.network
    assert (config.width, config.heads, config.depth) == (32, 2, 2)
    assert (config.head_width, config.head_heads, config.head_depth) == (48, 3, 1)
    assert (config.in_channels, config.grid, config.num_classes, config.qk_norm) == (16, (4, 4), 10, True)
    assert torch.equal(model.network.head_blocks[0].attn.qkv.weight, ditdh_weights["blocks.2.attn.qkv.weight"])
    assert torch.equal(model.network.time.frequencies, ditdh_weights["t_embedder.W"])


def test_dit_with_patches(save):
    weights = load_file(GOLDEN / "dit_patch2" / "weights.safetensors")
    config = convert_stage2(save(weights), flow=FLOW).config.network
    assert (config.kind, config.patch_size, config.grid, config.width) == ("dit", 2, (8, 8), 32)
    with pytest.raises(ConversionError, match="a DiT without a head, to which head_depth=1 does not apply"):
        convert_stage2(save(weights), flow=FLOW, head_depth=1)
    assert config.allow_narrow  # 32 wide, 64 numbers in a token: it exists, so it can be converted


def test_equal_widths_hide_where_the_head_begins(save):
    path = save(load_file(GOLDEN / "ditdh_equal_width" / "weights.safetensors"))
    with pytest.raises(ConversionError, match=r"both 32 wide.*of the 4 blocks.*give head_depth="):
        convert_stage2(path, flow=FLOW)
    config = convert_stage2(path, flow=FLOW, head_depth=2).config.network
    assert (config.depth, config.heads, config.head_depth, config.head_heads) == (2, 4, 2, 2)


def test_other_rotary_tables_are_refused(save, ditdh_weights):
    with pytest.raises(ConversionError, match=r"dec_feat_rope.freqs_sin .* is not the rotary table of a 4 x 4 grid"):
        convert_stage2(save(ditdh_weights | {"dec_feat_rope.freqs_sin": torch.zeros(16, 16)}), flow=FLOW)
    without = {key: value for key, value in ditdh_weights.items() if "rope" not in key}
    with pytest.raises(ConversionError, match=r"has no 'dec_feat_rope.freqs_cos'"):
        convert_stage2(save(without), flow=FLOW)


def test_options_that_no_published_model_uses_are_refused(save, ditdh_weights):
    without_shift = {key: v[: len(v) // 6 * 4] if "blocks.0.adaLN" in key else v for key, v in ditdh_weights.items()}
    with pytest.raises(ConversionError, match=r"blocks.0.adaLN_modulation.1.* where \[192.*modulation without shift"):
        convert_stage2(save(without_shift), flow=FLOW)
    layer_norm = {key: value for key, value in ditdh_weights.items() if key != "final_layer.norm_final.weight"}
    with pytest.raises(ConversionError, match=r"missing \(final_layer.norm_final.weight\).*LayerNorm"):
        convert_stage2(save(layer_norm), flow=FLOW)


# --- statistics ------------------------------------------------------------------------------------------------------


def test_statistics(save):
    mean, var = torch.randn(3, 2, 2), torch.rand(3, 2, 2)
    read = read_statistics(save({"mean": mean, "var": var}, "stat.pt"))
    assert torch.equal(read[0], mean)
    assert torch.equal(read[1], var)
    for wrong, message in (
        ({"mean": mean}, "not the 'mean' and 'var'"),
        ({"mean": mean, "var": var[0]}, r"mean \[3, 2, 2\] and var \[2, 2\]"),
        ({"mean": mean, "var": -var}, "a variance is negative"),
        ({"mean": mean, "var": None}, "not the 'mean' and 'var'"),
    ):
        with pytest.raises(ConversionError, match=message):
            read_statistics(save(wrong))


def test_running_statistics_keep_their_start_value():
    # k constant batches of value 1 from (0, 1): mean 1 - 0.9^k, variance 0.9^k
    mean, var = running_statistics([[torch.ones(4, 2, 1, 1)] * 5], momentum=0.1)
    torch.testing.assert_close(mean, torch.full((2, 1, 1), 1 - 0.9**5))
    torch.testing.assert_close(var, torch.full((2, 1, 1), 0.9**5))


# --- files that are something else -----------------------------------------------------------------------------------


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("opened"),))


def test_foreign_damaged_and_dangerous_files(tmp_path, monkeypatch, save, decoder_weights):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Exploit()))
    whole = save(decoder_weights).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    save({"state": Exploit()}, "exploit.pt")
    save([1, 2], "list.pt")
    save({"epoch": 3}, "other.pt")
    for name in ("absent.pt", "text.pt", "pickle.pt", "cut.pt", "exploit.pt", "list.pt"):
        with pytest.raises(ConversionError, match=name):
            read_file(tmp_path / name)
    with pytest.raises(ConversionError, match="calls getattr when it is opened"):
        read_file(tmp_path / "exploit.pt")
    with pytest.raises(ConversionError, match=r"epoch in the state dict are no tensors"):
        convert_decoder(tmp_path / "other.pt")
    assert not (tmp_path / "opened").exists()


def test_every_row_of_the_key_tables_is_used(decoder_weights, ditdh_weights):
    import re

    decoder = convert_decoder(GOLDEN / "rae_decode" / "weights.safetensors", heads=3)
    ditdh = convert_stage2(GOLDEN / "ditdh_qknorm" / "weights.safetensors", flow=FLOW).network
    for module, table in ((decoder, DECODER_KEYS), (ditdh, DITDH_KEYS)):
        for pattern, _ in table:
            assert any(re.fullmatch(pattern, key) for key in module.state_dict()), pattern
