"""Reference files: what goes in comes out, and nothing else is taken for one."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rae.evaluation.reference import (
    Classes,
    FeatureSet,
    Gaussian,
    ReferenceError,
    by_digest,
    collect,
    digest_order,
    is_adm_reference,
    load_reference,
    pixel_digests,
    read_adm_reference,
    save_reference,
)

ABOUT = {
    "source": "images",
    "identity": "0" * 64,
    "images": 50,
    "skipped": 3,
    "size": (28, 20),
    "crop": "as they are",
    "extractors": {"some/encoder": {"identity": "1", "input_size": [14, 14]}, "inception": {"identity": "2"}},
}


def features(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) @ torch.randn(dim, dim, generator=generator) + 3


@pytest.fixture
def file(tmp_path):
    whole = {"features": features(50, 6), "spatial": features(50, 4, 1), "logits": features(50, 3, 2)}
    sets = {
        "some/encoder": collect([{"features": features(50, 5, 3)}], 50, torch.arange(20)),
        "inception": collect([whole], 50),
    }
    save_reference(tmp_path / "r.safetensors", sets, **ABOUT)
    return tmp_path / "r.safetensors", sets


# --- collect


@pytest.mark.parametrize("cuts", [[50], [1, 49], [7] * 7 + [1]])
def test_moments_and_rows_do_not_depend_on_how_the_images_came(cuts):
    rows = features(50, 6)
    found = collect(({"features": part, "logits": part[:, :2]} for part in rows.split(cuts)), 50)
    mean, covariance = found.moments["features"]
    assert found.count == 50
    assert torch.equal(found.rows["features"], rows)
    assert torch.equal(found.rows["logits"], rows[:, :2])
    assert "logits" not in found.moments  # nobody asks for their covariance
    torch.testing.assert_close(mean, rows.double().mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(covariance, rows.double().T.cov(), rtol=1e-12, atol=1e-12)


def test_kept_rows_have_the_order_that_is_asked_for():
    rows, kept = torch.arange(2000.0)[:, None].expand(-1, 2), torch.randperm(2000)[:500]
    for size in (2000, 33):
        found = collect(({"features": part, "digests": part[:, 0].long()} for part in rows.split(size)), 2000, kept)
        assert torch.equal(found.rows["features"][:, 0], kept.float())
        assert torch.equal(found.rows["digests"], kept)
        assert found.count == 2000
        assert found.moments["features"].mean[0] == 999.5  # of all


def test_the_smallest_digests_are_an_even_draw_that_knows_no_order():
    """Of 2,000 images of rising brightness: 500 of them, as many of each quarter, and the same from the other end."""
    images = (torch.arange(2000)[:, None, None, None] + torch.tensor([0, 97, 61])[:, None, None]) // 8
    images = torch.cat([images, torch.arange(2000)[:, None, None, None].expand(-1, 3, -1, -1) % 8], dim=3).byte()
    digests, labels = pixel_digests(images), torch.zeros(2000, dtype=torch.int64)
    kept = digest_order(digests, labels)[:500]
    assert torch.equal(kept, 1999 - digest_order(digests.flip(0), labels)[:500])
    counts = kept.div(500, rounding_mode="floor").bincount()  # of each quarter: 125, standard deviation 8
    assert ((counts - 125).abs() < 40).all()
    fewer = digest_order(digests[1:], labels[1:])[:500] + 1  # without the first: at most one is another
    assert torch.isin(fewer, kept).sum() >= 499


def test_digests_tell_images_and_their_shapes():
    images = torch.arange(96, dtype=torch.uint8).reshape(2, 3, 2, 8)
    found = pixel_digests(images)
    assert found.dtype == torch.int64
    assert torch.equal(found.flip(0), pixel_digests(images.flip(0)))
    different = {*found.tolist(), *pixel_digests(images.reshape(2, 3, 4, 4)).tolist()}
    assert len(different) == 4


def test_rows_by_digest_know_no_order():
    digests, labels = torch.tensor([7, -3, 7, 5]), torch.tensor([1, 0, 0, 1])
    rows = {"features": torch.arange(4.0)[:, None], "digests": digests}
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        given = {kind: values[order] for kind, values in rows.items()}
        found = by_digest(FeatureSet(4, given, {}, Classes(labels[order], ["a", "b"])))
        assert found.rows["features"].flatten().tolist() == [1, 3, 2, 0]  # copies by their labels
        assert found.classes.labels.tolist() == [0, 1, 0, 1]
    earlier = FeatureSet(4, {"features": rows["features"]}, {})
    assert by_digest(earlier) is earlier


def test_parts_without_images_are_passed_over():
    parts = [{"features": features(3, 6)}, {"features": torch.zeros(0, 0)}, {"features": features(4, 6, 1)}]
    assert collect(parts, 7).rows["features"].shape == (7, 6)


def test_one_image_is_no_set():
    with pytest.raises(ValueError, match="1 image: a set needs at least 2"):
        collect([{"features": features(1, 4)}], 1)


# --- the file


def test_what_is_saved_is_loaded(file):
    path, sets = file
    about, loaded = load_reference(path)
    assert about.model_dump(exclude={"kind", "sha256"}) == ABOUT | {"drawn": "by digest", "class_names": None}
    assert about.skipped == 3
    assert loaded.keys() == sets.keys()
    for name, was in sets.items():
        now = loaded[name]
        assert now.count == 50
        assert now.rows.keys() == was.rows.keys()
        assert all(torch.equal(now.rows[kind], was.rows[kind]) for kind in was.rows)
        assert now.moments.keys() == was.moments.keys()
        for kind, moments in was.moments.items():
            assert torch.equal(now.moments[kind].mean, moments.mean)
            assert torch.equal(now.moments[kind].covariance, moments.covariance)
            assert now.moments[kind].covariance.dtype == torch.float64
    assert len(loaded["some/encoder"].rows["features"]) == 20


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    """It kept no digests, no count of images that could not be read, and drew its rows by their places."""
    sets = {"a": collect([{"features": features(5, 3)}], 5)}
    save_reference(tmp_path / "r.safetensors", sets, **ABOUT | {"extractors": {"a": {}}})
    with safe_open(tmp_path / "r.safetensors", "pt") as opened:
        said = json.loads(opened.metadata()["reference"])
    del said["skipped"], said["drawn"]
    tensors = load_file(tmp_path / "r.safetensors")
    save_file(tensors, tmp_path / "earlier.safetensors", metadata={"reference": json.dumps(said)})
    about, loaded = load_reference(tmp_path / "earlier.safetensors")
    assert (about.skipped, about.drawn, loaded["a"].digests) == (None, "by place", None)
    assert torch.equal(loaded["a"].rows["features"], sets["a"].rows["features"])


def test_a_changed_file_is_refused(file):
    path, _ = file
    with open(path, "r+b") as binary:
        binary.seek(-3, 2)
        binary.write(b"\x01")
    with pytest.raises(ReferenceError, match="damaged or was changed"):
        load_reference(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ReferenceError, match=r"cannot be read .* make it again with `rae reference`"):
        load_reference(path)


def test_tensors_under_other_names_are_refused(file):
    path, _ = file
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    mean = "inception/features.mean"
    tensors[mean], tensors["inception/x.mean"] = tensors[mean].clone(), tensors.pop(mean)
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata=metadata)
    with pytest.raises(ReferenceError, match="damaged or was changed"):
        load_reference(path)


def test_classes_of_the_rows_are_kept_with_them(tmp_path):
    classes = Classes(torch.tensor([1, 0, 1, 1, 0]), ["cat", "dog"])
    found = {name: collect([{"features": features(5, 3)}], 5) for name in "ab"}
    found = {name: dataclasses.replace(each, classes=classes) for name, each in found.items()}
    save_reference(tmp_path / "r.safetensors", found, **ABOUT | {"extractors": {"a": {}, "b": {}}})
    about, loaded = load_reference(tmp_path / "r.safetensors")
    assert about.class_names == ["cat", "dog"]
    for name in "ab":
        assert torch.equal(loaded[name].classes.labels, classes.labels)
        assert loaded[name].classes.names == ["cat", "dog"]


def test_digests_of_all_images_are_kept_with_any_number_of_rows(tmp_path):
    digests = torch.tensor([-(2**63), -1, 0, 5, 2**63 - 1])
    sets = {name: collect([{"features": features(5, 3)}], 5, torch.arange(2)) for name in "ab"}
    sets = {name: dataclasses.replace(each, digests=digests) for name, each in sets.items()}
    save_reference(tmp_path / "r.safetensors", sets, **ABOUT | {"extractors": {"a": {}, "b": {}}})
    _, loaded = load_reference(tmp_path / "r.safetensors")
    for name in "ab":
        assert torch.equal(loaded[name].digests, digests)
        assert torch.equal(by_digest(loaded[name]).digests, digests)
        assert loaded[name].rows.keys() == {"features"}


def test_other_files_are_no_references(tmp_path):
    save_file({"mean": torch.zeros(3)}, tmp_path / "stats.safetensors")
    with pytest.raises(ReferenceError, match=r"stats\.safetensors is no reference; `rae reference` makes one"):
        load_reference(tmp_path / "stats.safetensors")
    with pytest.raises(ReferenceError, match="cannot be read"):
        load_reference(tmp_path / "nowhere.safetensors")


# --- ADM's


def write_adm(path, **changed):
    rows = features(30, 5).double()
    arrays = {"mu": rows.mean(0).numpy(), "sigma": rows.T.cov().numpy()}
    arrays |= {"mu_s": rows.mean(0).numpy()[:2], "sigma_s": rows.T.cov().numpy()[:2, :2]}
    np.savez(path, arr_0=np.zeros((4, 8, 8, 3), np.uint8), **(arrays | changed))
    return arrays


def test_adm_reference_is_read(tmp_path):
    arrays = write_adm(tmp_path / "adm.npz")
    assert is_adm_reference(tmp_path / "adm.npz")
    found = read_adm_reference(tmp_path / "adm.npz")
    assert found.keys() == {"features", "spatial"}
    assert isinstance(found["features"], Gaussian)
    assert np.array_equal(found["features"].mean.numpy(), arrays["mu"])
    assert np.array_equal(found["spatial"].covariance.numpy(), arrays["sigma_s"])


def test_a_batch_of_samples_is_no_adm_reference(tmp_path):
    np.savez(tmp_path / "samples.npz", np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "text.npz").write_text("nothing")
    (tmp_path / "folder.npz").mkdir()
    for name in ("samples.npz", "text.npz", "folder.npz", "nowhere.npz"):
        assert not is_adm_reference(tmp_path / name)


def test_a_damaged_adm_reference_is_not_taken_for_its_images(tmp_path):
    write_adm(tmp_path / "adm.npz")
    whole = (tmp_path / "adm.npz").read_bytes()
    at = whole.rindex(b"sigma.npy")  # in the table of contents at the end, which no checksum covers
    (tmp_path / "adm.npz").write_bytes(whole[:at] + b"S" + whole[at + 1 :])
    with pytest.raises(ReferenceError, match=r"adm\.npz is damaged \(File name in directory .* differ"):
        is_adm_reference(tmp_path / "adm.npz")


def test_adm_reference_that_does_not_fit(tmp_path):
    write_adm(tmp_path / "adm.npz", sigma=np.zeros((4, 4)))
    with pytest.raises(ReferenceError, match=r"mu and sigma are \[5\] and \[4, 4\], not \[d\] and \[d, d\]"):
        read_adm_reference(tmp_path / "adm.npz")
    write_adm(tmp_path / "adm.npz", mu=np.array([object()], dtype=object))
    with pytest.raises(ReferenceError, match="cannot be read"):
        read_adm_reference(tmp_path / "adm.npz")
