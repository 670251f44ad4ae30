"""Pictures: the right pixel in the right place."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from fanal import pictures
from fanal.errors import FanalError

RED, GREEN = "#ff0000", "#00ff00"


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


def test_tiles_lie_row_by_row_with_their_own_levels():
    levels = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    sheet = pixels(pictures.grid(levels.reshape(5, 1, 1, 1).expand(5, 1, 8, 8), columns=3, scale=2))
    side = 8 * 2 + 2 * 4
    assert sheet.shape == (2 * side, 3 * side, 3)
    for i, level in enumerate(levels.tolist()):
        top, left = (i // 3) * side, (i % 3) * side
        tile = sheet[top + 4 : top + side - 4, left + 4 : left + side - 4]
        assert (tile == round((level + 1) * 127.5)).all(), i
        assert (sheet[top : top + 4, left : left + side] == 255).all()
    assert (sheet[side:, 2 * side :] == 255).all()  # the place that is left over


def test_frames_surround_the_sample_they_belong_to_and_no_other():
    x = torch.zeros(4, 1, 8, 8)
    plain = pixels(pictures.grid(x, columns=2, scale=1))
    framed = pixels(pictures.grid(x, columns=2, scale=1, frames=[None, RED, GREEN, None]))
    changed = (plain != framed).any(2)
    side = 16
    for i, color in enumerate([None, (255, 0, 0), (0, 255, 0), None]):
        top, left = (i // 2) * side, (i % 2) * side
        box = np.zeros_like(changed)
        box[top : top + side, left : left + side] = True
        box[top + 4 : top + side - 4, left + 4 : left + side - 4] = False
        assert (framed[box] == (color or (255, 255, 255))).all()
        assert changed[box].all() == (color is not None)
    assert changed.sum() == 2 * (side**2 - 8**2)


def test_colors_stay_in_their_channels_and_levels_are_clamped():
    x = torch.tensor([3.0, 0.0, -7.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    sheet = pixels(pictures.grid(x, scale=1))
    assert (sheet[4:8, 4:8] == [255, 128, 0]).all()


def test_rows_and_columns_of_an_image_are_not_swapped():
    x = torch.full((1, 1, 3, 5), -1.0)
    x[0, 0, 0, 4] = 1.0
    sheet = pixels(pictures.grid(x, scale=1))[4:-4, 4:-4, 0]
    assert sheet.shape == (3, 5)
    assert [tuple(place) for place in np.argwhere(sheet == 255)] == [(0, 4)]


def test_small_images_are_enlarged_without_blur():
    image = pictures.grid(torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8))
    assert image.size == (64 + 8, 64 + 8)
    tile = pixels(image)[4:-4, 4:-4, 0]
    assert (tile.reshape(8, 8, 8, 8) == tile[::8, ::8][:, None, :, None]).all()
    assert pictures.grid(torch.zeros(1, 1, 32, 32)).size == (72, 72)
    assert pictures.grid(torch.zeros(1, 3, 100, 100)).size == (108, 108)


@pytest.mark.parametrize(("count", "size"), [(1, (1, 1)), (2, (2, 1)), (5, (3, 2)), (9, (3, 3)), (10, (4, 3))])
def test_the_sheet_is_about_square(count, size):
    assert pictures.grid(torch.zeros(count, 1, 8, 8), scale=1).size == (16 * size[0], 16 * size[1])


@pytest.mark.parametrize(
    ("shape", "tile"), [((5,), (5, 1)), ((2, 3), (3, 2)), ((4, 6, 7), (7, 24)), ((2, 3, 4, 5), (5, 24))]
)
def test_what_is_no_image_is_drawn_as_pixels(shape, tile):
    assert pictures.grid(torch.zeros(1, *shape), scale=1).size == (tile[0] + 8, tile[1] + 8)


def test_points_lie_where_they_are_with_y_upwards():
    # The reach is 1.05 times the largest coordinate.
    x = torch.tensor([[1.0, 1.0], [-1.0, 0.5]], dtype=torch.float64)
    image = pictures.grid(x, frames=[RED, None])
    seen = pixels(image)
    assert image.size == (512, 512)
    column = [round((u / 1.05 + 1) / 2 * 511) for u in (1.0, -1.0)]
    row = [511 - round((v / 1.05 + 1) / 2 * 511) for v in (1.0, 0.5)]
    assert tuple(seen[row[0], column[0]]) == (255, 0, 0)
    assert tuple(seen[row[1], column[1]]) == (0x88, 0x99, 0xA6)
    assert row[0] < row[1]
    red = np.argwhere((seen == [255, 0, 0]).all(2))
    assert np.abs(red - [row[0], column[0]]).max() <= 4


def test_framed_points_lie_on_top():
    x = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, -1.0]])
    seen = pixels(pictures.grid(x, frames=[RED, None, None]))
    assert (seen == [255, 0, 0]).all(2).sum() > 20


def test_a_strip_keeps_both_ends():
    steps = torch.linspace(-1, 1, 41).reshape(41, 1, 1, 1).expand(41, 1, 8, 8)
    image = pixels(pictures.strip(steps, most=5))
    assert image.shape == (72, 5 * 72, 3)
    seen = [image[36, 72 * i + 36, 0] for i in range(5)]
    assert seen == [0, 64, 128, 191, 255]
    assert pictures.strip(steps[:3]).size == (3 * 72, 72)
    assert pictures.strip(torch.randn(9, 2)).size == (256, 256)


def test_the_last_point_of_a_strip_stands_out():
    seen = pixels(pictures.strip(torch.tensor([[0.0, 0.0], [1.0, 1.0]])))
    flag = [0xF0, 0xA2, 0x02]
    where = np.argwhere((seen == flag).all(2)).mean(0)
    assert where[0] < 20  # above
    assert where[1] > 235  # right


def test_a_data_uri_holds_the_very_picture():
    image = pictures.grid(torch.randn(3, 3, 8, 8))
    kind, _, text = pictures.data_uri(image).partition(",")
    assert kind == "data:image/png;base64"
    again = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    assert again.format == "PNG"
    assert (pixels(again) == pixels(image)).all()


@pytest.mark.parametrize(
    ("x", "frames", "words"),
    [
        (torch.zeros(0, 1, 8, 8), None, "empty"),
        (torch.zeros(3, 1, 8, 8), [None] * 2, "got 2 for 3"),
        (torch.zeros(3, 2), [None] * 4, "got 4 for 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused(x, frames, words):
    with pytest.raises(FanalError, match=words):
        pictures.grid(x, frames=frames)
