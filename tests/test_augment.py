"""Augmentation: what is done to an image, what the network is told, and that nothing is done at sampling."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fanal.augmentation import LABEL, augment, draw_augmentation, label, transform, warp
from fanal.errors import FanalError
from fanal.nets import DhariwalUNetConfig, MLPConfig, Preconditioned, SongUNetConfig, UNetConfig
from fanal.optimization import TrainingState, draw
from fanal.recipes import Recipe, change

NONE = torch.zeros(1, 8)
SMALL = UNetConfig(widths=(8, 16), factor=1, embedding=8, augment_dim=LABEL)
NETS = (
    SMALL,
    SongUNetConfig(model_channels=16, channel_mult=(1, 1), num_blocks=1, attn_resolutions=(4,), augment_dim=LABEL),
    DhariwalUNetConfig(model_channels=32, channel_mult=(1, 1), num_blocks=1, attn_resolutions=(), augment_dim=LABEL),
)


def parameters(**values):
    found = torch.zeros(1, 8)
    for name, value in values.items():
        found[0, int(name[1])] = value
    return found


def blob(x, y, side=64, width=4.0):
    """A bright spot at (x, y), which go from -1 to 1."""
    axis = (2 * torch.arange(side) + 1.0) / side - 1
    distance = (axis[None, :] - x) ** 2 + (axis[:, None] - y) ** 2
    return (-distance / (2 * (2 * width / side) ** 2)).exp()[None, None]


def center(image, x, y):
    """Where the spot near (x, y) is, and how bright; others are its reflections at the borders."""
    axis = (2 * torch.arange(image.shape[-1]) + 1.0) / image.shape[-1] - 1
    near = (axis[None, :] - x) ** 2 + (axis[:, None] - y) ** 2 < 0.3**2
    mass = image[0, 0] * near
    total = mass.sum()
    return (float((mass.sum(0) * axis).sum() / total), float((mass.sum(1) * axis).sum() / total)), float(mass.max())


def smooth(side=48):
    axis = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([(2 * x + y).sin(), (3 * y).cos() * x, (x * y).tanh()])[None]


def test_an_image_as_it_is_has_the_label_zero_and_stays_what_it_is():
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(label(NONE), torch.zeros(1, LABEL))
    assert torch.equal(augment(x, NONE.repeat(4, 1)), x)
    random = np.random.Generator(np.random.Philox(1))
    drawn = draw_augmentation(random, 50, 0.0)
    assert torch.equal(drawn[:, 1:], torch.zeros(50, 7))  # the mirror is always drawn
    assert 10 < int(drawn[:, 0].sum()) < 40  # 25 ± 3.5


def test_flips_are_exact():
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(augment(x, parameters(a0=1).repeat(2, 1)), x.flip(3))
    assert torch.equal(augment(x, parameters(a1=1).repeat(2, 1)), x.flip(2))
    both = torch.cat([parameters(a0=1, a1=1), NONE])
    assert torch.equal(augment(x, both), torch.cat([x[:1].flip(2, 3), x[1:]]))
    assert label(both)[:, :2].tolist() == [[1, 1], [0, 0]]
    moved = augment(x, torch.cat([parameters(a6=1.5), NONE]))  # a neighbor that is warped does not touch it
    assert torch.equal(moved[1], x[1])
    assert not torch.equal(moved[0], x[0])


@given(
    st.floats(-1.5, 1.5),
    st.floats(-math.pi, math.pi),
    st.floats(-math.pi, math.pi),
    st.floats(0, 1.5),
    st.floats(-1.0, 1.0),
    st.floats(-1.0, 1.0),
    st.booleans(),
)
def test_the_label_says_where_a_spot_went(a2, a3, a4, a5, a6, a7, mirrored):
    point = (0.25, -0.1)
    given_ = parameters(a0=float(mirrored), a2=a2, a3=a3, a4=a4, a5=a5, a6=a6, a7=a7)
    told = label(given_)[0].double()
    # Rebuilt from the label alone.
    x, y = (-point[0] if told[0] else point[0]), point[1]
    size = 2 ** (0.2 * float(told[2]))
    x, y = size * x, size * y
    c, s = float(told[3]) + 1, float(told[4])
    x, y = c * x - s * y, s * x + c * y
    stretch = math.hypot(float(told[5]), float(told[6]))
    if stretch > 1e-9:
        u, v = float(told[5]) / stretch, float(told[6]) / stretch
        along, across = u * x + v * y, -v * x + u * y
        along, across = along * 2 ** (0.2 * stretch), across / 2 ** (0.2 * stretch)
        x, y = u * along - v * across, v * along + u * across
    x, y = x + float(told[7]) / 4, y + float(told[8]) / 4  # an eighth of a side of length 2
    found, brightness = center(augment(blob(*point), given_), x, y)
    assert brightness > 0.9
    assert found == pytest.approx((x, y), abs=0.03)  # one pixel


def test_a_warped_image_warped_back_is_the_original_inside():
    x, random = smooth(), np.random.Generator(np.random.Philox(3))
    drawn = draw_augmentation(random, 40, 1.0)
    drawn[:, [2, 5, 6, 7]] = drawn[:, [2, 5, 6, 7]].clamp(-1, 1)
    matrix = transform(drawn)
    many = x.repeat(40, 1, 1, 1)
    back = warp(warp(many, matrix), torch.linalg.inv(matrix))
    inside = slice(20, 28)
    worst = (back - many)[:, :, inside, inside].abs().max()
    assert float(worst) < 0.02
    assert float((warp(many, matrix) - many)[:, :, inside, inside].abs().amax((1, 2, 3)).median()) > 0.3


def test_parameters_follow_the_published_distribution():
    random = np.random.Generator(np.random.Philox(5))
    count, probability = 20_000, 0.3
    drawn = draw_augmentation(random, count, probability).double()
    error = 5 * (0.25 / count) ** 0.5  # five standard errors of any share
    assert float(drawn[:, 0].mean()) == pytest.approx(0.5, abs=error)
    assert float(drawn[:, 1].mean()) == pytest.approx(probability / 2, abs=error)
    for k in (2, 3, 4, 6):
        assert float((drawn[:, k] != 0).double().mean()) == pytest.approx(probability, abs=error)
    assert torch.equal(drawn[:, 4] != 0, drawn[:, 5] != 0)  # direction and strength come together
    assert torch.equal(drawn[:, 6] != 0, drawn[:, 7] != 0)
    together = ((drawn[:, 2] != 0) & (drawn[:, 3] != 0)).double().mean()
    assert float(together) == pytest.approx(probability**2, abs=error)
    for k in (2, 5, 6, 7):  # standard normal: five standard errors of the square of 6,000 numbers
        assert float(drawn[:, k][drawn[:, k] != 0].square().mean()) == pytest.approx(1, abs=5 * (2 / 6000) ** 0.5)
    assert float(drawn[:, 5].min()) >= 0
    for k in (3, 4):  # uniform on a circle
        angle = drawn[:, k][drawn[:, k] != 0]
        assert float(angle.abs().max()) <= math.pi + 1e-6
        assert float(angle.var()) == pytest.approx(math.pi**2 / 3, rel=0.05)


def test_a_place_in_the_batch_draws_the_same_in_every_process():
    recipe = Recipe("photos", SMALL, 10, batch=12, augment=0.5, flip=True, seed=4)
    whole, again = draw(recipe, 3, 50, (3, 8, 8)), draw(recipe, 3, 50, (3, 8, 8))
    assert torch.equal(whole.augmentation, again.augmentation)
    assert torch.equal(whole.flip, again.flip)
    other = draw(recipe, 4, 50, (3, 8, 8))
    assert not torch.equal(whole.augmentation, other.augmentation)
    plain = draw(dataclasses.replace(recipe, augment=0.0, flip=False), 3, 50, (3, 8, 8))
    for name in ("indices", "sigma", "noise", "drop"):  # they do not notice
        assert torch.equal(getattr(plain, name), getattr(whole, name))
    assert plain.augmentation is None


@pytest.mark.parametrize("config", NETS, ids=lambda c: type(c).__name__)
def test_the_label_zero_is_no_augmentation(config):
    torch.manual_seed(0)
    model = Preconditioned(config, (3, 8, 8)).eval()
    for weight in model.parameters():
        weight.data.normal_(0, 0.2)
    x, sigma = torch.randn(4, 3, 8, 8), torch.tensor(0.7)
    assert torch.equal(model(x, sigma), model(x, sigma, None, torch.zeros(4, LABEL)))
    assert not torch.allclose(model(x, sigma), model(x, sigma, None, torch.ones(4, LABEL)), atol=1e-4)


def test_a_network_that_knows_augmentations_starts_like_one_that_does_not():
    plain = dataclasses.replace(SMALL, augment_dim=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a = Preconditioned(plain, (3, 8, 8)).state_dict()
        torch.manual_seed(0)
        b = Preconditioned(plain, (3, 8, 8)).state_dict()
    assert not any("augment" in name for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a)
    told = Preconditioned(SMALL, (3, 8, 8)).state_dict()
    assert set(told) - set(a) == {"net.conditioning.augment.weight"}


class Photos:
    """Forty 8x8 images of noise."""

    name, shape, verdicts, classes, broken_kinds = "photos", (3, 8, 8), (), (), {}

    def data(self, split="train", count=None, seed=0):
        from fanal.datasets import Data

        return Data(torch.randn(count or 40, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def test_training_tells_the_network_what_was_done(monkeypatch):
    recipe = Recipe("photos", SMALL, 4, batch=8, augment=0.9, flip=True, held_out_count=0)
    run = TrainingState.start(recipe, Photos(), None, torch.device("cpu"))
    seen = []
    forward = type(run.model.net).forward
    monkeypatch.setattr(
        type(run.model.net),
        "forward",
        lambda self, x, c, labels, told=None: (seen.append(told), forward(self, x, c))[1],
    )
    run.step()
    chance = draw(recipe, 0, 40, (3, 8, 8))
    assert len(seen) == 1
    assert torch.equal(seen[0], label(chance.augmentation))
    run.averaged(torch.randn(2, 3, 8, 8), torch.tensor(1.0))
    assert seen[1] is None  # nothing at sampling


def test_augmentation_and_data_must_fit():
    with pytest.raises(FanalError, match="an MLP cannot be told"):
        Recipe("points", MLPConfig(), 4, augment=0.1)
    with pytest.raises(FanalError, match="augment_dim = 9, got 0"):
        Recipe("photos", UNetConfig(), 4, augment=0.1)
    with pytest.raises(FanalError, match=r"augment must be in \[0, 1\)"):
        Recipe("photos", SMALL, 4, augment=1.0)
    assert change(Recipe("photos", UNetConfig(), 4), {"augment": 0.1}).net.augment_dim == LABEL

    class Points(Photos):
        shape = (2,)

    with pytest.raises(FanalError, match="square images"):
        TrainingState.start(Recipe("points", MLPConfig(), 4, flip=True), Points(), None, torch.device("cpu"))
