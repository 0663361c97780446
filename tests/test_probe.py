"""`rae probe`: the optimum of the linear probe, votes of neighbours, splits, figures; the command on tiny latents."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from rae.commands import probe_features
from rae.commands.pictures import OutputError
from rae.commands.probe import write_probe
from rae.config import ConfigError
from rae.data import images as images_module
from rae.data.image_set import ImageError
from rae.data.images import DataConfig, open_images
from rae.evaluation.probe import (
    choose_decay,
    fit_path,
    measure_accuracy,
    neighbour_votes,
    part_of_each_class,
)

NAMES = [str(i) for i in range(10)]


def clusters(n: int, classes: int = 3, d: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around a centre for each class, which overlap; every class is there."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    return centres[labels] + torch.randn(n, d, generator=random), labels


# --- linear probe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [4, 60])  # fewer features than images, and more
def test_linear_probe_is_that_of_scikit_learn(d):
    features, labels = clusters(40, d=d)
    for probe in fit_path(features, labels, 3, [0.1, 1e-3]):
        x = (features.double() - probe.mean) / probe.std
        theirs = LogisticRegression(C=1 / (40 * probe.weight_decay), tol=1e-11, max_iter=20000).fit(x, labels)
        scores = torch.from_numpy(theirs.decision_function(x))
        ours = probe.scores(features)
        torch.testing.assert_close(ours - ours.mean(1, True), scores - scores.mean(1, True), rtol=0, atol=1e-4)


def test_gradient_is_zero_at_the_optimum():
    features, labels = clusters(50)
    (probe,) = fit_path(features, labels, 3, [0.01])
    w, b = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    x = (features.double() - probe.mean) / probe.std
    (F.cross_entropy(x @ w.T + b, labels) + 0.005 * w.square().sum()).backward()
    assert probe.gap <= 1e-12
    assert max(w.grad.abs().max(), b.grad.abs().max()) < 1e-6


def test_probe_needs_no_order_and_no_constant_feature():
    features, labels = clusters(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    wide = torch.cat([features, torch.full((60, 1), 7.0)], dim=1)
    (a,), (b,), (c,) = (
        list(fit_path(f, y, 3, [1e-2]))
        for f, y in ((features, labels), (features[order], labels[order]), (wide, labels))
    )
    torch.testing.assert_close(a.scores(features), b.scores(features), rtol=0, atol=1e-6)
    torch.testing.assert_close(a.scores(features), c.scores(wide + torch.eye(6)[5]), rtol=0, atol=1e-6)


def test_weight_decay_is_the_best_on_the_images_that_choose():
    features, labels = clusters(90, d=30)
    held_out = torch.arange(90) < 30
    grid = (100.0, 1.0, 1e-2, 1e-4, 1e-6)
    decay, tried = choose_decay(features, labels, held_out, 3, grid)
    fits = fit_path(features[~held_out], labels[~held_out], 3, grid)
    values = {p.weight_decay: measure_accuracy(p.scores(features[held_out]), labels[held_out]).top1.value for p in fits}
    assert values[decay] == max(values[t.decay] for t in tried)
    assert [t.accuracy for t in tried] == [values[t.decay] for t in tried]


def test_features_that_cannot_be_probed_are_refused():
    features, labels = clusters(9)
    broken = features.clone()
    broken[4, 2] = float("nan")
    with pytest.raises(ValueError, match=r"1 of 9 images are not finite \(first: 4\)"):
        next(fit_path(broken, labels, 3, [1.0]))
    with pytest.raises(ValueError, match="not finite"):
        neighbour_votes(features, labels, broken, 3, k=1)
    with pytest.raises(ValueError, match="the same for all"):
        next(fit_path(torch.ones(9, 2), labels, 3, [1.0]))
    with pytest.raises(ValueError, match=r"\[3\] have no images"):
        next(fit_path(features, labels, 4, [1.0]))


# --- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [None, 0.07])
def test_votes_are_those_of_scikit_learn(temperature, monkeypatch):
    monkeypatch.setattr("rae.evaluation.probe.BLOCK", 200)  # several blocks
    (features, labels), (test, _) = clusters(50), clusters(20, seed=1)
    weights = "uniform" if temperature is None else lambda distance: np.exp((1 - distance) / temperature)
    theirs = KNeighborsClassifier(7, weights=weights, metric="cosine", algorithm="brute").fit(features.double(), labels)
    votes = neighbour_votes(features, labels, test, 3, k=7, temperature=temperature)
    expected = torch.from_numpy(theirs.predict_proba(test.double()))
    torch.testing.assert_close(votes / votes.sum(1, True), expected, rtol=0, atol=1e-9)


def test_votes_by_hand_and_ties():
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    labels, test = torch.tensor([1, 0, 2, 0]), torch.tensor([[5.0, 0.0]])
    votes = neighbour_votes(features, labels, test, 3, k=4, temperature=0.5)
    e = torch.tensor(2.0).double().exp()
    torch.testing.assert_close(votes, torch.stack([2 * e, e, torch.ones_like(e)])[None])
    # three are equally near, and the first ones are taken: labels 1, 0
    assert neighbour_votes(features, labels, test, 3, k=2, temperature=None).tolist() == [[1, 1, 0]]
    with pytest.raises(ValueError, match="5 neighbours asked for among 4"):
        neighbour_votes(features, labels, test, 3, k=5)
    with pytest.raises(ValueError, match="all zero"):
        neighbour_votes(features, labels, 0 * test, 3, k=1)


# --- parts and figures -----------------------------------------------------------------------------------------------


def test_part_belongs_to_the_images_and_copies_stay_together():
    labels, digests = torch.arange(40) % 2, torch.arange(40) // 4  # every digest twice in each class
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    chosen = part_of_each_class(labels, digests, 0.3, NAMES)
    assert part_of_each_class(labels[order], digests[order], 0.3, NAMES).equal(chosen[order])
    assert chosen.sum() == 12
    for label in (0, 1):
        of = labels == label
        assert not set(digests[of & chosen].tolist()) & set(digests[of & ~chosen].tolist())
    with pytest.raises(ValueError, match="class '1' has 2 images, and they are the same"):
        part_of_each_class(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2, 3, 3]), 0.5, NAMES)


def test_accuracies_by_hand():
    scores = torch.eye(7)[[0, 1, 2, 2, 0]]  # the last one is of class 6, and six classes are equal behind class 0
    found = measure_accuracy(scores, torch.tensor([0, 1, 2, 1, 6]))
    assert found.right.tolist() == [True, True, True, False, False]
    assert found.top1 == (0.6, pytest.approx((0.6 * 0.4 / 4) ** 0.5), None)
    assert found.top5.value == 0.8  # of equals the lower number comes first: 1 is among five, 6 is not
    assert [figure and figure.value for figure in found.per_class] == [1, 0.5, 1, None, None, None, 0]
    assert [tuple(c) for c in found.confused] == [(1, 2, 1, 0.5), (6, 0, 1, 1.0)]
    assert measure_accuracy(torch.eye(5), torch.arange(5)).top5 is None


# --- the command -----------------------------------------------------------------------------------------------------


def write_images(folder, count: int, *, first: int = 0, classes=("dark", "light"), offset: int = 0) -> str:
    """Noise around a brightness of each class; a set of other names has other files in another order."""
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(first, first + count):
            pixels = np.random.default_rng((c, i)).normal(90 + 40 * c, 50, (8, 8, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{(i * 7 + offset) % 1000:04d}.png")
    return str(folder)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[str, str]:
    """Training and test images in two classes; not to be written to."""
    root = tmp_path_factory.mktemp("sets")
    return write_images(root / "train", 30), write_images(root / "test", 12, first=100)


def probe(source: str, test: str | float, out, names=("pixels@8",), **settings) -> dict:
    settings = {"pools": ("none",), "neighbours": 5} | settings
    return write_probe(list(names), DataConfig(source=source, enlarge=True), test, Path(out), **settings)


def figures(found: dict) -> list:
    return [{key: value for key, value in row.items() if key != "identity"} for row in found["rows"]]


def test_spaces_stand_beside_each_other(sets, encoder, finished, tmp_path, capsys):
    names = (str(encoder), str(finished), "pixels@8")
    found = probe(*sets, tmp_path / "out", names, image_size=(16, 16), pools=("mean", "none"))
    assert json.loads((tmp_path / "out/probe.json").read_text()) == json.loads(json.dumps(found))
    assert [row["features"] for row in found["rows"]] == [16, 64, 16, 64, 3, 192]
    assert found["rows"][0]["ahead_of_first"]["linear"]["value"] == 0
    assert found["rows"][4]["linear"]["top1"]["value"] > 0.9  # brightness is what tells them
    assert [found["protocol"][part]["images"] for part in ("training", "test")] == [60, 24]
    assert "60 training and 24 test images of 2 classes" in capsys.readouterr().out


def test_features_are_kept_and_damage_is_told(sets, tmp_path, monkeypatch):
    first = probe(*sets, tmp_path)
    monkeypatch.setattr("rae.autoencoder.baselines.Pixels.encode", None)  # nothing is encoded again
    assert figures(probe(*sets, tmp_path)) == figures(first)
    assert probe(*sets, tmp_path, neighbours=3, temperature=None)["rows"][0]["linear"] == first["rows"][0]["linear"]
    monkeypatch.undo()
    files = sorted(tmp_path.glob("features/*/000000.safetensors"))
    files[0].unlink()  # as after an interruption
    assert figures(probe(*sets, tmp_path)) == figures(first)
    files[0].write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(OutputError, match="is damaged"):
        probe(*sets, tmp_path)


def test_figures_depend_neither_on_batch_nor_on_order(sets, encoder, tmp_path):
    settings = {"names": (str(encoder),), "image_size": (16, 16)}
    one = probe(sets[0], 0.25, tmp_path / "a", batch=32, **settings)
    other = probe(sets[0], 0.25, tmp_path / "b", batch=7, **settings)
    moved = probe(write_images(tmp_path / "moved", 30, offset=500), 0.25, tmp_path / "c", **settings)
    for found in (other, moved):
        for kind in ("linear", "neighbours"):
            assert found["rows"][0][kind]["top1"] == one["rows"][0][kind]["top1"]
        assert found["rows"][0]["linear"]["loss"] == pytest.approx(one["rows"][0]["linear"]["loss"], rel=1e-5)


def test_all_that_is_missing_is_read_by_one_loader(sets, tmp_path, monkeypatch):
    """Processes that decode are started once, and a chunk that is there is not read again."""
    monkeypatch.setattr(probe_features, "CHUNK", 16)
    made, real = [], images_module.loader
    monkeypatch.setattr(images_module, "loader", lambda *settings: made.append(settings[1]) or real(*settings))
    settings = {"batch": 6, "pools": ("none", "mean")}
    first = probe(sets[0], 0.25, tmp_path, **settings)
    files = sorted(tmp_path.glob("features/*/*.safetensors"))
    assert len(files) == 8
    for chunk in (1, 3):  # 16 to 31, 48 to 59
        files[chunk].unlink()
    assert figures(probe(sets[0], 0.25, tmp_path, **settings)) == figures(first)
    parts = [range(16, 22), range(22, 28), range(28, 32), range(48, 54), range(54, 60)]
    assert made == [[part for k in range(0, 60, 16) for part in split(k, min(k + 16, 60), 6)], parts]


def split(start: int, stop: int, batch: int) -> list[range]:
    return [range(at, min(at + batch, stop)) for at in range(start, stop, batch)]


def test_images_that_cannot_be_read_are_left_out_of_their_chunk(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(probe_features, "CHUNK", 16)
    images = Path(write_images(tmp_path / "images", 30))
    files = sorted(images.rglob("*.png"))
    whole = probe(sets[0], 0.25, tmp_path / "a", batch=4)
    for file in (*files[4:8], files[9], *files[16:32]):  # a batch, one of a batch, a chunk
        file.write_bytes(b"no picture")
    data = DataConfig(source=str(images), on_broken="skip")
    found = write_probe(["pixels@8"], data, 0.25, tmp_path / "b", pools=("none",), neighbours=5, batch=4)
    assert len(found["protocol"]["test"]["unreadable"]) == 21
    left = [found["protocol"][part]["images"] for part in ("training", "test")]
    assert sum(left) == 60 - 21 < sum(whole["protocol"][part]["images"] for part in ("training", "test"))


def test_an_image_that_can_be_read_again_is_not_left_out(sets, tmp_path):
    images = Path(write_images(tmp_path / "images", 30))
    file = sorted(images.rglob("*.png"))[7]
    sound = file.read_bytes()
    file.write_bytes(b"x" * len(sound))
    data = DataConfig(source=str(images), on_broken="skip")

    def unreadable() -> list[str]:
        found = write_probe(["pixels@8"], data, 0.25, tmp_path / "out", pools=("none",), neighbours=5)
        return found["protocol"]["test"]["unreadable"]

    assert unreadable() == [str(file)]
    file.write_bytes(sound)
    with pytest.raises(OutputError, match=rf"{file} could not be read when .*, and can be now.* Remove"):
        unreadable()
    (place,) = (tmp_path / "out/features").iterdir()
    shutil.rmtree(place)
    assert unreadable() == []


def test_sets_are_told_apart_by_pixels_and_not_by_sizes_in_bytes(tmp_path):
    """Uncompressed images of the same names are of one `Images.identity`, whatever they show."""
    for name, first in (("train", 0), ("test", 100)):
        for c, kind in enumerate(("dark", "light")):
            (tmp_path / name / kind).mkdir(parents=True)
            for i in range(12):
                pixels = np.random.default_rng((c, first + i)).normal(90 + 40 * c, 50, (8, 8, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / kind / f"{i:04d}.bmp")
    train, test = str(tmp_path / "train"), str(tmp_path / "test")
    assert open_images(train).identity == open_images(test).identity
    found = probe(train, test, tmp_path / "out")
    assert found["protocol"]["test"]["also_in_training"] == []
    for file in (tmp_path / "train").rglob("*.bmp"):  # other pixels in its place
        shutil.copy(tmp_path / "test" / file.relative_to(tmp_path / "train"), file)
    with pytest.raises(ImageError, match="all 24 test images"):
        probe(train, test, tmp_path / "out")


def test_images_that_were_changed_are_told(tmp_path):
    train, test = (write_images(tmp_path / name, 12, first=first) for name, first in (("train", 0), ("test", 100)))
    file = sorted(Path(train).rglob("*.png"))[5]  # not the first one, by whose pixels features are found
    file.write_bytes(file.read_bytes() + b" " * 99)
    probe(train, test, tmp_path / "out")
    probe(train, test, tmp_path / "out")
    other = sorted(Path(test).rglob("*.png"))[5].read_bytes()
    assert len(other) <= file.stat().st_size
    file.write_bytes(other.ljust(file.stat().st_size))
    with pytest.raises(OutputError, match=rf"{file} has other pixels than when .*00.safetensors was made .* Remove"):
        probe(train, test, tmp_path / "out")


def test_copies_are_refused_before_anything_is_encoded(sets, tmp_path, monkeypatch):
    monkeypatch.setattr("rae.commands.probe.open_latents", None)
    copy = shutil.copytree(sets[0], tmp_path / "copy")
    with pytest.raises(ImageError, match=rf"all 60 test images \({copy}\) are training images of {sets[0]} as well"):
        probe(sets[0], str(copy), tmp_path / "out")


def test_features_that_are_no_longer_probed_are_removed(sets, tmp_path, capsys):
    def probed(*arguments, **settings) -> tuple[set[Path], list[str]]:
        """The folders of features that are there, and what is said of those that are not."""
        probe(*arguments, tmp_path / "out", **settings)
        said = [line for line in capsys.readouterr().err.splitlines() if "is removed" in line]
        return set((tmp_path / "out/features").iterdir()), said

    whole, said = probed(*sets)
    assert (len(whole), said) == (2, [])
    both, said = probed(*sets, pools=("mean",))
    assert (len(both), both > whole, said) == (4, True, [])  # of the same images
    others = {tmp_path / "out/features" / name for name in ("judged", "of the user")}
    for place in others:
        place.mkdir()
    (tmp_path / "out/features/judged/e").mkdir()
    about = {"images": 9, "identity": "x", "size": [8, 8], "crop": False}  # of `rae evaluate`
    (tmp_path / "out/features/judged/e/features.json").write_text(json.dumps(about))
    now, said = probed(*sets, num=20)
    assert len(now - others) == 2 + 1
    assert now >= others
    assert sorted(said) == [
        f"note: {place} is removed: features of other images, at another size, or by an earlier version"
        for place in sorted(both - now)
    ]


def test_two_processes_have_the_figures_of_one(sets, tmp_path, monkeypatch):
    monkeypatch.setattr("rae.commands.probe_features.CHUNK", 16)
    script = tmp_path / "probe.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nimport rae.commands.probe_features as features\n"
        "from rae.commands.probe import write_probe\nfrom rae.data.images import DataConfig\nfeatures.CHUNK = 16\n"
        "train, test, out = sys.argv[1:]\n"
        "write_probe(['pixels@8'], DataConfig(source=train), test, Path(out), pools=('none',), neighbours=5)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    subprocess.run([*launch, *sets, str(tmp_path / "two")], check=True, capture_output=True)
    two = json.loads((tmp_path / "two/probe.json").read_text())
    assert figures(two) == json.loads(json.dumps(figures(probe(*sets, tmp_path / "one"))))


def test_what_cannot_be_probed_is_said(sets, encoder, tmp_path):
    train, test = sets
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "a.png")
    one = write_images(tmp_path / "one", 4, classes=("dark",))
    few = write_images(tmp_path / "few", 1)
    other = write_images(tmp_path / "other", 3, first=200, classes=("dark", "grey"))
    copies = write_images(tmp_path / "copies", 3, offset=1)
    cases = [
        ((str(flat), 0.5), ImageError, "has no classes"),
        ((one, 0.5), ImageError, "one class only"),
        ((few, 0.5), ImageError, "2 of 2 classes have fewer than 3 training images"),
        ((train, other), ImageError, "the classes of"),
        ((train, train + "/../train"), ImageError, "holds the images of"),
        ((train, copies), ImageError, "all 6 test images"),
        ((train, 1.5), ConfigError, "between 0 and 1"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            probe(*arguments, tmp_path / "out")
    for settings, message in [
        ({"num": 1000}, "holds 60 images, 1,000 are asked for"),
        ({"neighbours": 61}, "61 neighbours are asked for among 60"),
        ({"names": (str(encoder),)}, "say which with --image-size"),
        ({"image_size": (16, 16)}, "leave --image-size"),
        ({"names": ("pixels@8", "pixels@8")}, "named twice"),
    ]:
        with pytest.raises(ConfigError, match=message):
            probe(train, test, tmp_path / "out2", **settings)
    assert not (tmp_path / "out2").exists()
    with pytest.raises(OutputError, match="something else"):
        probe(train, test, flat)


def test_a_part_of_the_images_keeps_the_proportions_and_copies_are_told(sets, tmp_path, capsys):
    found = probe(*sets, tmp_path, num=20, num_test=10)
    assert (found["protocol"]["training"]["images"], found["protocol"]["test"]["images"]) == (20, 10)
    mixed = tmp_path / "mixed"
    write_images(mixed, 3)
    for name in ("dark", "light"):
        Image.new("RGB", (8, 8), "white" if name == "light" else "black").save(mixed / name / "new.png")
    found = probe(sets[0], str(mixed), tmp_path)
    assert len(found["protocol"]["test"]["also_in_training"]) == 6
    assert "6 test images are training images as well" in capsys.readouterr().err


def test_all_right_is_no_error_of_nought(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name, brightness in (("dark", 20), ("light", 230)):
        (tmp_path / "x" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (8, 8), (brightness + i % 10, brightness, brightness + i // 10)).save(
                tmp_path / f"x/{name}/{i}.png"
            )
    found = probe(str(tmp_path / "x"), 0.5, tmp_path / "out", pools=("mean", "none"))
    for row in found["rows"]:
        assert row["linear"]["top1"] == {"value": 1.0, "error": None, "bound": pytest.approx(0.05 ** (1 / 20))}
    assert found["rows"][1]["ahead_of_first"]["linear"] == {"value": 0.0, "error": None}
    told = capsys.readouterr().out
    assert "all, above 86 %" in told
    assert "(+0.0)" in told
    assert "± 0.0" not in told


def test_a_size_that_cannot_be_is_told_before_an_encoder_is_loaded(sets, tmp_path, monkeypatch):
    monkeypatch.setattr("rae.commands.probe_features.load_encoder", None)
    data, small = DataConfig(source=sets[0]), r"8 x 8 pixels .* smaller than the 28 x 28 asked for.* --enlarge"
    for test in (sets[1], 0.2):
        with pytest.raises(ImageError, match=small):
            write_probe(["any-encoder"], data, test, tmp_path / "out", image_size=(28, 28))
    assert not (tmp_path / "out").exists()


def test_latents_that_are_not_finite_end_it(sets, tmp_path, monkeypatch):
    monkeypatch.setattr("rae.autoencoder.baselines.Pixels.encode", lambda self, images: images / 0)
    with pytest.raises(FloatingPointError, match=r"png: its latents by pixels@8 are not finite"):
        probe(*sets, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
