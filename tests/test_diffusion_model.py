"""A saved model comes back bit for bit, and whatever is not a saved model is refused with the reason."""

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import rae.folders
from rae.config import ConfigError
from rae.diffusion.dit import DiTConfig, DiTDHConfig
from rae.diffusion.flow import Flow, data_from_velocity
from rae.diffusion.model import DiffusionModel, DiffusionModelConfig
from rae.sources import SourceError

COMMON = {"in_channels": 6, "grid": (2, 3), "width": 16, "heads": 2, "depth": 1, "num_classes": 3}
NETWORKS = {
    "dit": DiTConfig(**COMMON),
    "dit-dh": DiTDHConfig(**COMMON, head_width=24, head_heads=3, head_depth=1, qk_norm=True),
    "narrow": DiTConfig(**COMMON | {"in_channels": 20}, allow_narrow=True),
}


def make(network: str = "dit", **flow) -> DiffusionModel:
    torch.manual_seed(3)
    config = DiffusionModelConfig(
        network=NETWORKS[network],
        flow=Flow(shift=1.7, **flow),
        latent_identity="0123456789abcdef",
        class_names=("cat", "dog", "bird"),
    )
    model = DiffusionModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def inputs(model):
    return torch.randn(2, *model.latent_shape), torch.tensor([0.2, 0.9]), torch.tensor([1, 3])


@pytest.fixture
def saved(tmp_path):
    make("dit-dh").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change):
    data = json.loads((folder / "config.json").read_text())
    change(data)
    (folder / "config.json").write_text(json.dumps(data))


def accept(folder):
    """Make config.json agree with the weights as they are now: what is wrong with them is then found elsewhere."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edit(folder, lambda config: config["files"].update({"model.safetensors": digest}))


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("prediction", ["v", "x"])
def test_saved_and_loaded_is_the_same_to_the_bit(tmp_path, network, prediction):
    model = make(network, prediction=prediction, time_law="logit-normal", logit_mean=-0.3)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = DiffusionModel.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config
    state, state_again = model.network.state_dict(), again.network.state_dict()
    assert state.keys() == state_again.keys()
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    arguments = inputs(model)
    assert torch.equal(again(*arguments), model(*arguments))
    assert not any(p.requires_grad for p in again.parameters())


def test_a_folder_holds_two_files_and_no_pickle(saved):
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_again_replaces_and_a_foreign_folder_is_left_alone(saved, tmp_path):
    other = make("dit")
    other.save_pretrained(saved)
    assert DiffusionModel.from_pretrained(saved).config == other.config
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    edit(saved, lambda config: config.update(kind="autoencoder"))
    before = (saved / "config.json").read_bytes()
    with pytest.raises(ValueError, match="model exists and is not a saved diffusion model"):
        other.save_pretrained(saved)
    assert (saved / "config.json").read_bytes() == before


def test_loading_draws_no_random_weights(saved):
    expected = make("dit-dh")
    state = torch.get_rng_state()
    model = DiffusionModel.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), state)
    buffers, expected = dict(model.named_buffers()), dict(expected.named_buffers())
    assert buffers.keys() == expected.keys() == {"network.rotary", "network.head_rotary"}
    assert all(torch.equal(buffers[name], expected[name]) for name in buffers)  # in no file, so computed


def test_a_home_folder_and_a_hub_id(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    make().save_pretrained("~/other")
    assert DiffusionModel.from_pretrained("~/other").config == make().config
    asked = []
    monkeypatch.setattr(rae.folders, "fetch_hub", lambda name, files, _: asked.append((name, files)) or saved)
    assert DiffusionModel.from_pretrained("somebody/model").config == make("dit-dh").config
    ((name, files),) = asked
    assert (name, {"config.json", "*.safetensors"} <= set(files)) == ("somebody/model", True)


def test_rounded_weights_are_neither_saved_nor_loaded(saved):
    model = make("dit-dh")
    model.network.head_embed.half()
    with pytest.raises(ValueError, match=r"cannot be saved: head_embed\.weight is torch\.float16"):
        model.save_pretrained(saved)
    weights = load_file(saved / "model.safetensors")
    save_file(weights | {"position": weights["position"].bfloat16()}, saved / "model.safetensors")
    accept(saved)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be loaded: position is torch\.bfloat16"):
        DiffusionModel.from_pretrained(saved)


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(ValueError, match="this run has saved nothing yet"):
        DiffusionModel.from_pretrained(tmp_path)
    make("dit").save_pretrained(tmp_path / "checkpoints" / "000000100" / "model")
    assert DiffusionModel.from_pretrained(tmp_path).config.network.kind == "dit"  # killed before it had a pointer
    make("dit-dh").save_pretrained(tmp_path / "checkpoints" / "000000200" / "model")
    (tmp_path / "latest").write_text("000000100\n")
    assert DiffusionModel.from_pretrained(tmp_path).config.network.kind == "dit"
    (tmp_path / "latest").write_text("000000300\n")
    with pytest.raises(ValueError, match="latest names checkpoint '000000300', which is not there"):
        DiffusionModel.from_pretrained(tmp_path)


def test_dtype_is_that_of_the_products_not_of_the_weights(saved):
    exact, rounded = (DiffusionModel.from_pretrained(saved, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    arguments = inputs(exact)
    a, b = exact(*arguments), rounded(*arguments)
    assert b.dtype == torch.float32
    assert 0 < (a - b).abs().max() < 0.1 * a.abs().max()


def test_call_gives_velocity_and_predict_the_networks_own():
    model, same = make(prediction="x"), make()
    x, t, y = inputs(model)
    with torch.no_grad():
        assert torch.equal(model.predict(x, t, y), same.predict(x, t, y))
        torch.testing.assert_close(data_from_velocity(model(x, t, y), x, t), model.predict(x, t, y))
        assert torch.equal(same(x, t, y), same.predict(x, t, y))


def test_what_it_knows_of_itself():
    model = make()
    assert model.latent_shape == (6, 2, 3)
    assert model.null_label == 3
    assert model.flow.shift == 1.7
    assert model.label_indices(["bird", "cat"]).tolist() == model.label_indices(torch.tensor([2, 0])).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("label", "hint"),
    [
        ("tench", "did you mean 'tench, Tinca tinca', index 0?"),
        ("Tinca tinca", "did you mean 'tench, Tinca tinca', index 0?"),
        ("tinch", "did you mean 'tench, Tinca tinca', index 0?"),
        ("trench cot", "did you mean 'trench coat', index 2?"),
        ("zzz", "it knows 'tench, Tinca tinca', 'goldfish', 'trench coat'; their indices 0..2 are taken as well."),
    ],
)
def test_an_unknown_class_is_led_to_its_name_and_index(label, hint):
    model = another(names=("tench, Tinca tinca", "goldfish", "trench coat"))
    assert model.label_indices(["tench, Tinca tinca", "goldfish"]).tolist() == [0, 1]
    with pytest.raises(ValueError, match=re.escape(f"class {label!r} is not among the 3 of this model; {hint}") + "$"):
        model.label_indices([label])


def test_where_names_are_numbers_no_index_is_offered():
    model = another(names=("7", "8", "99"))
    with pytest.raises(ValueError, match=r"it knows '7', '8', '99'\.$"):
        model.label_indices(["2"])
    with pytest.raises(ValueError, match=r"did you mean '99'\?$"):
        model.label_indices(["999"])


# --- starting from another model -------------------------------------------------------------------------------------


def another(network: str = "dit", names: tuple[str, ...] | None = ("cat", "dog", "bird"), **changes):
    """A fresh model of other classes or grid."""
    settings = {"num_classes": len(names or ())} | changes
    shift, identity = settings.pop("shift", 1.7), settings.pop("latent_identity", "0123456789abcdef")
    prediction = settings.pop("prediction", "v")
    torch.manual_seed(4)
    return DiffusionModel(
        DiffusionModelConfig(
            network=type(NETWORKS[network])(**NETWORKS[network].model_dump() | settings),
            flow=Flow(shift=shift, prediction=prediction),
            latent_identity=identity,
            class_names=names,
        )
    )


@pytest.mark.parametrize("network", ["dit", "dit-dh"])
def test_the_same_model_is_taken_over_whole(network):
    model, other = another(network), make(network)
    assert model.start_from(other) == ["3 of 3 classes are known by name"]
    state = other.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.network.state_dict().items())


def test_classes_keep_their_embeddings_by_name_and_new_ones_begin_as_the_null_class():
    model, other = another(names=("fox", "dog", "cat", "owl")), make()
    assert model.start_from(other) == ["2 of 4 classes are known by name, the others begin as its null class"]
    assert torch.equal(model.network.labels.weight, other.network.labels.weight[[3, 1, 0, 3, 3]])
    x, t, _ = inputs(other)
    with torch.no_grad():
        cat, null = torch.tensor([2, 4]), torch.tensor([0, 3])
        assert torch.equal(model(x, t, cat), other(x, t, null))  # cat and no class, as each of them numbers them


@pytest.mark.parametrize(
    ("changes", "rows", "said"),
    [
        ({"names": None, "num_classes": 3}, [0, 1, 2, 3], "taken by number, since one of the models has no names"),
        ({"names": None, "num_classes": 2}, [3, 3, 3], "for its 3 classes these 2 begin as its null class"),
        ({"names": None}, [3], "its 3 classes are left out, and its null class is taken"),
    ],
)
def test_classes_without_names(changes, rows, said):
    model, other = another(**changes), make()
    assert said in model.start_from(other)[0]
    assert torch.equal(model.network.labels.weight, other.network.labels.weight[rows])


def test_a_null_class_that_was_never_trained_is_said():
    other = make()
    other.config = other.config.model_copy(update={"drop_labels": 0.0})
    assert another(names=("fox",)).start_from(other)[0].endswith("begin as its null class, which was never trained")


def test_another_resolution_resizes_positions_and_nothing_else():
    other = make("dit-dh")
    ramp = torch.arange(3).repeat(2)[:, None].expand(6, 16).float()  # the number of the column, in a grid of 2 x 3
    other.network.position.data = ramp.clone()
    model = another("dit-dh", grid=(4, 6), shift=2.4, latent_identity="fedcba9876543210")
    assert model.start_from(other) == [
        "the latent space (encoder, image size, latent statistics) is another: 0123456789ab -> fedcba987654",
        "the shift of the times is another: 1.7 -> 2.4",
        "positions are resized: (2, 3) -> (4, 6) tokens",
        "3 of 3 classes are known by name",
    ]
    table = model.network.position.view(4, 6, 16)
    assert torch.equal(table, table[:1, :, :1].expand(4, 6, 16))  # still the same in every row and channel
    # at columns 0.75 and 1.25 of 0, 1, 2: w(d) = 1.25 d^3 - 2.25 d^2 + 1, and -0.75 (d^3 - 5 d^2 + 8 d - 4) beyond 1
    assert table[0, 2:4, 0].tolist() == pytest.approx([0.66796875, 1.33203125])
    state = other.network.state_dict()
    for name, value in model.network.state_dict().items():
        assert name == "position" or torch.equal(value, state[name]), name
    fresh = another("dit-dh", grid=(4, 6))
    assert torch.equal(model.network.rotary, fresh.network.rotary)
    assert model(*inputs(model)).shape == (2, 6, 4, 6)


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        ("dit-dh", {}, "a network of kind dit-dh cannot start from one of dit; take network.kind=dit"),
        ("dit", {"width": 32}, r"of width 32 cannot start from one of 16; take network.size=\[16,2,1\]"),
        ("dit", {"depth": 2}, r"of depth 2 cannot start from one of 1; take network.size=\[16,2,1\]"),
        ("dit", {"in_channels": 4}, "of in_channels 4 cannot start from one of 6; take an autoencoder with as many"),
        ("dit", {"qk_norm": True}, "of qk_norm True cannot start from one of False; take network.qk_norm=False"),
        ("dit", {"prediction": "x"}, "predicts x cannot start from one that predicts v; take flow.prediction=v"),
    ],
)
def test_networks_that_are_not_alike_are_refused(network, changes, message):
    model = another(network, **changes)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.start_from(make("dit"))
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())


# --- files that are not such a model ---------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(SourceError, match="nowhere: no such folder"):
        DiffusionModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=f"{re.escape(str(tmp_path))} holds no saved model"):
        DiffusionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_weights_are_refused(saved, keep):
    weights = saved / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or was changed"):
        DiffusionModel.from_pretrained(saved)
    accept(saved)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        DiffusionModel.from_pretrained(saved)


def test_a_flipped_bit_is_found(saved):
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (saved / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or was changed"):
        DiffusionModel.from_pretrained(saved)


def test_missing_weights_are_refused(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        DiffusionModel.from_pretrained(saved)


def test_a_pickle_in_place_of_weights_is_refused(saved):
    torch.save(make("dit-dh").network.state_dict(), saved / "model.safetensors")
    accept(saved)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        DiffusionModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("position"), "position"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra"),
        (lambda w: w.update(position=torch.zeros(7, 16)), r"\[7, 16\].*\[6, 16\]"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_fit_exactly(saved, change, message):
    weights = load_file(saved / "model.safetensors")
    change(weights)
    save_file(weights, saved / "model.safetensors")
    accept(saved)
    with pytest.raises(ValueError, match=f"(?s)does not fit its config.json.*{message}"):
        DiffusionModel.from_pretrained(saved)


def test_weights_of_another_network_are_refused(saved, tmp_path):
    make("dit").save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(saved / "model.safetensors")
    accept(saved)
    with pytest.raises(ValueError, match="head_blocks"):
        DiffusionModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["network"].update(dephts=c["network"].pop("depth")), r"network\.dephts.*'depth'"),
        (lambda c: c["flow"].update(shfit=2.0), r"flow\.shfit.*'shift'"),
        (lambda c: c["flow"].pop("shift"), r"flow\.shift.*required"),
        (lambda c: c["network"].update(kind="u-net"), r"network.*u-net|u-net.*network"),
        (lambda c: c["network"].pop("kind"), "network.*kind"),
        (lambda c: c["network"].update(head_width=4, head_heads=1), "Theorem 1"),
        (lambda c: c.update(class_names=["cat", "dog"]), "2 class names for 3 classes"),
        (lambda c: c["flow"].update(shift="large"), r"flow\.shift.*large"),
        (lambda c: c.pop("files"), "files: required"),
        (lambda c: c.update(drop_labels=1.5), "drop_labels.*1.5"),
    ],
)
def test_configurations_that_do_not_fit_name_file_and_key(saved, change, message):
    edit(saved, change)
    with pytest.raises(ConfigError, match=f"(?s){message}") as error:
        DiffusionModel.from_pretrained(saved)
    assert str(saved / "config.json") in str(error.value)


@pytest.mark.parametrize("text", ['{"model_type": "dinov2", "hidden_size": 384}', "[1, 2]", '{"network": {', ""])
def test_foreign_and_damaged_configurations_are_refused(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        DiffusionModel.from_pretrained(saved)


def test_a_file_in_place_of_a_folder_points_to_the_converter(tmp_path):
    (tmp_path / "stage2_model.pt").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match="rae convert"):
        DiffusionModel.from_pretrained(tmp_path / "stage2_model.pt")
