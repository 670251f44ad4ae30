"""The hallucination index and the Hellinger distance of Gaussians, against integrals and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

import fanal
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.metrics import hallucination_index, hellinger

F64 = torch.float64


def line(mean, std):
    return torch.tensor([mean], dtype=F64), torch.tensor([[std**2]], dtype=F64)


@pytest.mark.parametrize(
    ("one", "two"), [((0.0, 1.0), (0.5, 2.0)), ((1.0, 0.3), (-1.0, 0.4)), ((0.0, 1.0), (0.0, 1.0))]
)
def test_it_is_the_integral_in_one_dimension(one, two):
    # H² = ½∫(√p − √q)²
    found = hellinger(*line(*one), *line(*two))
    half, _ = quad(lambda t: (math.sqrt(norm.pdf(t, *one)) - math.sqrt(norm.pdf(t, *two))) ** 2 / 2, -20, 20, limit=400)
    assert found == pytest.approx(math.sqrt(half), abs=1e-6)


def test_independent_entries_multiply_and_rotations_change_nothing():
    a = [(0.0, 1.0), (0.5, 0.7), (-0.2, 2.0)]
    b = [(0.3, 1.5), (0.1, 0.5), (0.4, 1.0)]
    overlap = math.prod(1 - hellinger(*line(*p), *line(*q)) ** 2 for p, q in zip(a, b, strict=True))
    means = [torch.tensor([m for m, _ in side], dtype=F64) for side in (a, b)]
    covs = [torch.tensor([s**2 for _, s in side], dtype=F64).diag() for side in (a, b)]
    whole = hellinger(means[0], covs[0], means[1], covs[1])
    assert whole == pytest.approx(math.sqrt(1 - overlap), rel=1e-12)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(0)))
    turned = [turn @ cov @ turn.T for cov in covs]
    assert hellinger(turn @ means[0], turned[0], turn @ means[1], turned[1]) == pytest.approx(whole, rel=1e-10)
    assert hellinger(means[1], covs[1], means[0], covs[0]) == pytest.approx(whole, rel=1e-12)


def test_far_apart_is_one_and_nothing_overflows():
    mean, cov = torch.zeros(500, dtype=F64), 1e-8 * torch.eye(500, dtype=F64)
    assert hellinger(mean, cov, mean + 1, cov) == 1.0
    assert hellinger(mean, cov, mean, cov) == 0.0


def test_of_reconstructions_of_gaussian_data_it_is_the_closed_form():
    # data N(0, s²): the reconstruction of y = truth + sigma·n by its posterior mean shrinks towards 0 by c
    shape, s, sigma, count = (2, 2), 0.8, 0.5, 40_000
    truth = torch.tensor([[1.0, -0.5], [0.2, 0.9]], dtype=F64)
    y = truth + fanal.noise(shape, range(count), sigma, dtype=F64)
    x = Gaussian(torch.zeros(shape, dtype=F64), s**2)(y, torch.tensor(sigma, dtype=F64))
    c = s**2 / (s**2 + sigma**2)
    eye = torch.eye(4, dtype=F64)
    exact = hellinger(c * truth.flatten(), (c * sigma) ** 2 * eye, truth.flatten(), sigma**2 * eye)
    for diagonal in (False, True):
        found = hallucination_index(x, truth, sigma, diagonal=diagonal)
        assert 0 < found.se < 0.01
        assert abs(found.value - exact) < 4 * found.se + 1e-3  # and a bias of some (entries/n)
    # measurements with less noise hallucinate less; so does a reverse process that is stopped early
    assert float(hallucination_index(y, truth, sigma).value) < 0.02
    half = truth + (x - truth) * 0.5 + (y - truth) * 0.5
    assert hallucination_index(half, truth, sigma).value < exact


def test_the_standard_error_is_the_spread_of_repetitions():
    truth = torch.zeros(3, dtype=F64)
    draws = [
        hallucination_index(0.4 + fanal.noise((3,), range(1000 * k, 1000 * k + 200), 1.3, dtype=F64), truth, 1.0)
        for k in range(60)
    ]
    values = torch.tensor([draw.value for draw in draws])
    typical = sum(draw.se for draw in draws) / len(draws)
    assert typical == pytest.approx(float(values.std()), rel=0.3)  # a spread of 60 is known to a tenth


def test_mistakes_are_told():
    truth, x = torch.zeros(30), torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    with pytest.raises(FanalError, match="at least 34 reconstructions, got 30, or diagonal=True"):
        hallucination_index(x, truth, 1.0)  # no more samples than entries
    assert 0 < hallucination_index(x, truth, 1.0, diagonal=True).value < 1
    with pytest.raises(FanalError, match="truth's shape"):
        hallucination_index(x, torch.zeros(3), 1.0)
    with pytest.raises(FanalError, match="sigma > 0, got 0"):
        hallucination_index(x, truth, 0.0, diagonal=True)
    with pytest.raises(FanalError, match="the same in all"):
        hallucination_index(torch.zeros(40, 2), torch.zeros(2), 1.0, diagonal=True)
    with pytest.raises(FanalError, match="first covariance is not positive definite"):
        hellinger(truth, torch.zeros(30, 30), truth, torch.eye(30))
