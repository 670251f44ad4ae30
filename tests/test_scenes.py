"""scenes64: what the verifier measures is what was drawn, and it measures it whatever else is in the picture."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from fanal.datasets import get
from fanal.datasets.base import to_images
from fanal.datasets.levels import Levels
from fanal.datasets.scenes_drawing import (
    CELL,
    COLORS,
    KINDS,
    PAINTS,
    PETALS,
    SIZE,
    Sprite,
    compose,
    draw,
    draw_butterflies,
    draw_cups,
    draw_flowers,
)

SCENES = get("scenes64")
COUNT = 300


def images(levels):
    return Levels(levels).data().x


@functools.cache
def drawn():
    rng = np.random.default_rng(0)
    bits = rng.integers(1, 8, COUNT)
    factors = draw(rng, bits)
    x = images(compose(COUNT, factors.sprites()))
    return bits, factors, {name: v.double().numpy() for name, v in SCENES.measure(x).items()}


def test_kinds_and_petals_are_counted():
    bits, factors, seen = drawn()
    for k, name in enumerate(("flowers", "butterflies", "cups")):
        assert (seen[name] == (bits >> k & 1)).all()
    petals = np.zeros(COUNT)
    petals[factors.rows[0]] = np.isfinite(factors.parts[0].tip).sum(axis=1)
    assert (seen["petals"] == petals).all()
    paints = np.zeros((COUNT, 3))
    for rows, parts in zip(factors.rows, factors.parts, strict=True):
        np.add.at(paints, (rows, parts.paint[:, 0]), 1)
    assert (np.stack([seen[name] for name in PAINTS], axis=1) == paints).all()
    for name in ("loose", "mixed", "malformed", "extra", "missing", "uneven", "broken"):
        assert (seen[name] == 0).all(), name


def test_sizes_are_those_of_the_parts():
    _, factors, seen = drawn()
    flowers, butterflies, cups = factors.parts
    radius = np.nanmean(flowers.tip, axis=1)
    assert np.abs(seen["flower_radius"][factors.rows[0]] - radius).max() < 0.6
    assert np.corrcoef(seen["flower_radius"][factors.rows[0]], radius)[0, 1] > 0.95
    wings = 2 * (butterflies.upper**2 + butterflies.lower**2)[:, 0]
    assert np.corrcoef(seen["wing_area"][factors.rows[1]], wings)[0, 1] > 0.95
    area = cups.width * cups.height
    assert np.abs(seen["cup_area"][factors.rows[2]] / area - 1).max() < 0.2
    assert np.corrcoef(seen["cup_area"][factors.rows[2]], area)[0, 1] > 0.95
    for name, rows in (("flower_radius", 0), ("wing_area", 1), ("cup_area", 2)):
        absent = np.setdiff1d(np.arange(COUNT), factors.rows[rows])
        assert (seen[name][absent] == 0).all()


def test_every_object_has_a_quarter_of_its_own():
    bits, factors, _ = drawn()
    for row, taken in enumerate(factors.cell):
        there = taken[taken >= 0]
        assert len(set(there.tolist())) == len(there) == int(bits[row]).bit_count()
    # Four quarters, equally likely: about 170 objects of each kind, a share of 1/4 with a standard error of 0.034.
    for k in range(len(KINDS)):
        shares = np.bincount(factors.cell[factors.rows[k], k], minlength=4) / len(factors.rows[k])
        assert np.abs(shares - 0.25).max() < 5 * 0.034


def test_flowers_have_as_many_petals_as_their_paint_says():
    for paint, due in enumerate(PETALS):
        for extra in (-1, 0, 1):
            parts = draw_flowers(np.random.default_rng(1), np.full(50, paint), extra)
            assert (np.isfinite(parts.tip).sum(axis=1) == due + extra).all()


def alone(image):
    """One object, in the first quarter."""
    count = len(image)
    return images(compose(count, [Sprite(image, np.arange(count), np.zeros(count, dtype=np.int64))]))


def test_wings_agree_less_the_more_one_shrinks():
    agreement = []
    for share in (1.0, 0.9, 0.8, 0.7, 0.5):
        parts = draw_butterflies(np.random.default_rng(2), np.zeros(40, dtype=np.int64))
        parts.upper[:, 0] *= share
        parts.lower[:, 0] *= share
        agreement.append(SCENES.measure(alone(parts.render()))["mirror"].mean().item())
    assert agreement[0] > 0.93
    assert all(a > b + 0.02 for a, b in zip(agreement, agreement[1:], strict=False))
    # Areas shrink with the square of the share.
    assert agreement[3] == pytest.approx(0.49, abs=0.1)


def test_wings_agree_at_any_angle_and_in_any_color():
    parts = draw_butterflies(np.random.default_rng(3), np.arange(60) % 3)
    parts.turn[:] = np.linspace(-np.pi, np.pi, 60)
    parts.center[:] = CELL / 2
    assert SCENES.measure(alone(parts.render()))["mirror"].min() > 0.85


def test_a_handle_holds_or_it_does_not():
    parts = draw_cups(np.random.default_rng(4), np.zeros(40, dtype=np.int64))
    assert (SCENES.verify(alone(parts.render())) == 0).all()
    parts.open[:] = 3.0
    broken = SCENES.verdicts.index("broken handle")
    assert (SCENES.verify(alone(parts.render())) == broken).all()
    parts.ring[:] = 0.0
    assert (SCENES.verify(alone(parts.render())) == broken).all()


def test_objects_are_judged_whatever_lies_beside_them():
    # A fault stays the same fault when real objects join it; a malformed or a mixed one would come first.
    for kind in ("one wing", "open handle", "more petals"):
        x = SCENES.broken(kind, 200)
        seen, codes = SCENES.measure(x), SCENES.verify(x)
        assert len(seen["objects"].unique()) > 1
        assert (codes == SCENES.verdicts.index(SCENES.broken_kinds[kind][0])).all()


def test_all_colors_are_told_apart():
    # A patch of each color, and of its nearest neighbor's: only the three that mark a kind make an object.
    for k, color in enumerate(COLORS):
        image = np.zeros((1, CELL, CELL, 3), dtype=np.float32)
        image[0, 12:18, 12:18] = color
        seen = {name: int(value) for name, value in SCENES.measure(alone(image)).items()}
        assert seen["loose"] == (k < 3)
        assert [seen["flowers"], seen["butterflies"], seen["cups"]] == [k == 3, k == 4, k == 5]


def test_training_images_are_stored_as_bytes():
    stored, plain = SCENES.levels("train", 20), SCENES.data("train", 20)
    assert stored.values.dtype == np.uint8
    assert torch.equal(stored.data().x, plain.x)
    assert plain.x.shape == (20, 3, SIZE, SIZE)


def test_gray_pictures_are_refused():
    from fanal.errors import FanalError

    with pytest.raises(FanalError, match=r"\(N, 3, 64, 64\)"):
        SCENES.verify(to_images(np.zeros((2, SIZE, SIZE))))
