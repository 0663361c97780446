"""DiffAug: where pixels go, what colours become, how much is cut out; linear, differentiable, each image by itself."""

import pytest
import torch
from torch import Tensor

from rae.data.order import augmentation_draws
from rae.training.diffaug import DRAWS, diffaug

SHIFT_Y, SHIFT_X, BRIGHTNESS, SATURATION, CONTRAST, HOLE_Y, HOLE_X = range(DRAWS)
LAST = 1 - 2**-24  # the largest draw in float32
ONLY_MOVED, ONLY_COLOUR, ONLY_CUT = ((kind == 0, kind == 1, kind == 2) for kind in range(3))


def draws(batch: int = 1, **changes: float) -> Tensor:
    values = torch.full((DRAWS, batch), 0.5)
    for name, value in changes.items():
        values[globals()[name.upper()]] = value
    return values


def shift(pixels: int, side: int) -> float:
    """The draw in the middle of those that move by so many pixels."""
    reach = round(side / 8)
    return (pixels + reach + 0.5) / (2 * reach + 1)


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- translation


@pytest.mark.parametrize("dy", [-2, 0, 1])
@pytest.mark.parametrize("dx", [-3, -1, 3])
def test_a_pixel_is_found_where_the_draws_put_it(dy, dx):
    x = torch.zeros(1, 3, 16, 24)
    x[0, :, 5, 7] = torch.tensor([0.1, 0.2, 0.3])
    moved = diffaug(x, draws(shift_y=shift(dy, 16), shift_x=shift(dx, 24)), gates=ONLY_MOVED)
    expected = torch.zeros(1, 3, 16, 24)
    expected[0, :, 5 - dy, 7 - dx] = torch.tensor([0.1, 0.2, 0.3])
    assert torch.equal(moved, expected)


@pytest.mark.parametrize(("draw", "row"), [(0.0, 2), (LAST, 13)])
def test_the_furthest_moves_are_an_eighth_and_nothing_wraps(draw, row):
    x = torch.zeros(1, 3, 16, 16)
    x[0, :, [0, 15]] = 1  # first and last row
    moved = diffaug(x, draws(shift_y=draw), gates=ONLY_MOVED)
    assert moved[0, 0].sum(1).nonzero().flatten().tolist() == [row]  # the other row is gone, not on the other side
    assert torch.equal(diffaug(x.mT, draws(shift_x=draw), gates=ONLY_MOVED), moved.mT)


@pytest.mark.parametrize(("dy", "dx"), [(2, 3), (-2, 1), (0, 0)])
def test_what_is_moved_in_is_grey(dy, dx):
    moved = diffaug(torch.ones(1, 3, 16, 24), draws(shift_y=shift(dy, 16), shift_x=shift(dx, 24)), gates=ONLY_MOVED)
    assert set(moved.unique().tolist()) <= {0, 1}
    assert moved[0, 0].sum() == (16 - abs(dy)) * (24 - abs(dx))


def test_all_distances_are_equally_likely():
    count = 5 * 40
    x = torch.zeros(count, 1, 16, 3).index_fill_(2, torch.tensor([8]), 1)
    values = draws(count)
    values[SHIFT_Y] = (torch.arange(count) + 0.5) / count
    rows = diffaug(x, values, gates=ONLY_MOVED)[:, 0, :, 1].argmax(1)
    assert rows.bincount(minlength=16)[6:11].tolist() == [40] * 5


# --- colour


def test_draws_in_the_middle_change_no_colour():
    x = image(2, 3, 8, 8)
    torch.testing.assert_close(diffaug(x, draws(2), gates=ONLY_COLOUR), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("draw", [0.0, 0.3, LAST])
def test_brightness_is_added(draw):
    x = image(1, 3, 8, 8)
    y = diffaug(x, draws(brightness=draw), gates=ONLY_COLOUR)
    torch.testing.assert_close(y, x + draw - 0.5, rtol=0, atol=1e-6)


@pytest.mark.parametrize("draw", [0.0, 0.3, LAST])
def test_saturation_scales_the_distance_from_each_pixel_s_grey(draw):
    x = image(1, 3, 8, 8)
    y = diffaug(x, draws(saturation=draw), gates=ONLY_COLOUR)
    torch.testing.assert_close(y.sum(1), x.sum(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(y[:, 0] - y[:, 2], 2 * draw * (x[:, 0] - x[:, 2]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("draw", [0.0, 0.3, LAST])
def test_contrast_scales_the_deviation_from_the_image_s_mean(draw):
    x = image(2, 3, 8, 8)
    y = diffaug(x, draws(2, contrast=draw), gates=ONLY_COLOUR)
    torch.testing.assert_close(y.mean((1, 2, 3)), x.mean((1, 2, 3)), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.std((1, 2, 3)), (draw + 0.5) * x.std((1, 2, 3)))


# --- cutout


@pytest.mark.parametrize(
    ("hole_y", "hole_x", "rows", "columns"),
    [
        (0.5, 0.5, range(8, 12), range(4, 6)),  # around 10 of 0..20 and 5 of 0..10
        (0.0, LAST, range(2), range(9, 10)),  # half of it is outside
        (LAST, 0.0, range(18, 20), range(1)),
        (0.3, 0.4, range(4, 8), range(3, 5)),
    ],
)
def test_cutout_is_a_rectangle_around_its_place(hole_y, hole_x, rows, columns):
    y = diffaug(torch.ones(1, 3, 20, 10), draws(hole_y=hole_y, hole_x=hole_x), cutout=0.2, gates=ONLY_CUT)
    expected = torch.ones(1, 3, 20, 10)
    expected[:, :, rows.start : rows.stop, columns.start : columns.stop] = 0
    assert torch.equal(y, expected)


def test_cutout_has_its_area_wherever_it_fits():
    count = 200
    values = torch.rand(DRAWS, count, generator=torch.Generator().manual_seed(0))
    y = diffaug(torch.ones(count, 3, 20, 10), values, cutout=0.2, gates=ONLY_CUT)
    areas = (y[:, 0] == 0).sum((1, 2))
    y_at, x_at = values[HOLE_Y] * 21, values[HOLE_X] * 11
    inside = (y_at >= 2) & (y_at < 19) & (x_at >= 1) & (x_at < 10)
    assert (areas[inside] == 4 * 2).all()
    assert (areas[~inside] < 4 * 2).all()
    assert inside.float().mean() > 0.5


def test_nothing_is_cut_out_unless_asked_for():
    x = image(1, 3, 20, 10)
    assert torch.equal(diffaug(x, draws(), cutout=0.0, gates=ONLY_CUT), x)
    assert torch.equal(diffaug(x, draws(), cutout=0.2, gates=(False, False, False)), x)
    for draw in (0.0, LAST):  # a fiftieth of 20 pixels is less than half a pixel
        assert torch.equal(diffaug(x, draws(hole_y=draw, hole_x=draw), cutout=0.02, gates=ONLY_CUT), x)


# --- all together


def test_gradient_is_the_adjoint_of_what_is_done():
    values = torch.rand(DRAWS, 2, generator=torch.Generator().manual_seed(3)).double()
    x, direction, weight = (image(2, 3, 16, 24, seed=seed).double() for seed in range(3))
    x.requires_grad_()
    y = diffaug(x, values, cutout=0.3)
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    along = diffaug(x + direction, values, cutout=0.3) - y  # it is affine in the image
    torch.testing.assert_close((gradient * direction).sum(), (along * weight).sum(), rtol=1e-10, atol=0)
    assert gradient.abs().max() > 0.1


def test_each_image_is_augmented_by_itself_and_by_its_draws():
    values = torch.rand(DRAWS, 3, generator=torch.Generator().manual_seed(4))
    x = image(3, 3, 16, 24)
    together = diffaug(x, values, cutout=0.3)
    for i in range(3):
        assert torch.equal(diffaug(x[i : i + 1], values[:, i : i + 1], cutout=0.3), together[i : i + 1])
    assert not torch.equal(diffaug(x, values.flip(1), cutout=0.3), together)


def test_draws_belong_to_the_position_whatever_its_batch():
    together = augmentation_draws([3, 4, 90], 7, 0)
    assert together.shape == (DRAWS, 3)
    assert torch.equal(augmentation_draws([90, 4], 7, 0), together[:, [2, 1]])
    for other in (augmentation_draws([3, 4, 90], 8, 0), augmentation_draws([3, 4, 90], 7, 1)):
        assert (other != together).all()  # of another seed, or for another purpose
    many = augmentation_draws(range(2000), 0, 2)
    assert many.min() >= 0
    assert many.max() < 1
    assert many.mean(1).tolist() == pytest.approx([0.5] * DRAWS, abs=0.03)
    assert torch.corrcoef(many).fill_diagonal_(0).abs().max() < 0.1
