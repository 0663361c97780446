"""Picture files <=> tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from rae import load_images, save_image
from rae.data.crops import center_crop
from rae.data.image_set import ImageError


def test_what_is_saved_is_loaded(tmp_path):
    images = torch.randint(0, 256, (2, 3, 8, 6)) / 255
    for i, image in enumerate(images):
        save_image(image, tmp_path / f"{i}.png")
    assert torch.equal(load_images([tmp_path / "0.png", str(tmp_path / "1.png")], (8, 6)), images)


def test_a_batch_is_saved_side_by_side_and_clamped(tmp_path):
    save_image(torch.tensor([-1.0, 0.5, 3.0])[:, None, None, None].expand(3, 3, 2, 4), tmp_path / "row.png")
    found = np.asarray(Image.open(tmp_path / "row.png"))
    assert found.shape == (2, 12, 3)
    assert np.unique(found[:, :4]) == [0]
    assert np.unique(found[:, 4:8]) == [128]
    assert np.unique(found[:, 8:]) == [255]


def test_crops_are_those_of_training(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    (loaded,) = load_images([tmp_path / "a.png"], (16, 24))
    assert torch.equal((loaded * 255).byte().permute(1, 2, 0), torch.from_numpy(center_crop(picture, (16, 24)).copy()))


def test_small_pictures_are_refused_unless_asked_for(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a.png is 10 x 20 pixels .* 16 x 16 .*enlarge=True"):
        load_images([tmp_path / "a.png"], (16, 16))
    assert load_images([tmp_path / "a.png"], (16, 16), enlarge=True).shape == (1, 3, 16, 16)


def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(TypeError, match="give a list"):
        load_images("a.png", (16, 16))
    with pytest.raises(ValueError, match=r"\[4, 8, 8\]"):
        save_image(torch.zeros(4, 8, 8), tmp_path / "a.png")
    with pytest.raises(ValueError, match="not finite"):
        save_image(torch.full((3, 8, 8), torch.nan), tmp_path / "a.png")


def test_one_number_is_both_sides(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    assert load_images([tmp_path / "a.png"], 8).shape == (1, 3, 8, 8)
    with pytest.raises(ImageError, match=r"10 x 20 pixels .* 16 x 16"):
        load_images([tmp_path / "a.png"], 16)


def test_what_is_no_list_of_files_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"is a folder; give a list: load_images\(sorted\(Path\("):
        load_images(tmp_path, 8)
    with pytest.raises(ValueError, match="no files to load"):
        load_images([], 8)
    with pytest.raises(ImageError, match=r"nowhere\.png: there is no such file"):
        load_images([tmp_path / "nowhere.png"], 8)
