"""The denoiser of a data set against float64 by direct differences, its derivatives, and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fanal
from fanal.denoiser import Labelled
from fanal.errors import FanalError
from fanal.exact import Dataset, Gaussian, LowRank, Mixture, dataset
from fanal.exact.streaming import stream


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def pictures(count, dim=768, seed=0):
    """Points with a spectrum that falls like an image's, in [−1, 1] or so, and a mean far from zero."""
    rate = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.6
    turn = torch.linalg.qr(normal(dim, dim, seed=9)).Q
    return 0.3 + 3 * (normal(count, dim, seed=seed) * rate) @ turn


def direct(points, x, sigma):
    """D, log density, entropy and weights by direct differences in float64."""
    y, x = points.flatten(1).double(), x.flatten(1).double()
    level = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1)
    logits = torch.stack([-((row - y) ** 2).sum(1) for row in x]) / (2 * level**2)
    logs = logits.log_softmax(1)
    weights = logs.exp()
    volume = y.shape[1] / 2 * torch.log(2 * math.pi * level[:, 0] ** 2)
    density = logits.logsumexp(1) - math.log(len(y)) - volume
    return weights @ y, density, -(weights * logs.nan_to_num(neginf=0)).sum(1), weights


def error(got, want):
    return float(((got.flatten(1).double() - want).norm(dim=1) / want.norm(dim=1)).max())


LEVELS = (80.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.05, 0.01, 0.002)


@pytest.mark.parametrize("sigma", LEVELS)
def test_float32_is_exact_to_the_tolerance_at_every_sigma(sigma):
    """Near ties too: every point has a twin three sigma away, where float32 logits alone are off by many nats."""
    points = pictures(1500).float()
    points = torch.cat([points, points + 3 * sigma * torch.nn.functional.normalize(normal(1500, 768, seed=3)).float()])
    D = Dataset(points)
    x = points[:24] + sigma * normal(24, 768, seed=5).float()
    want, density, entropy, _ = direct(points, x, sigma)
    assert error(D(x, torch.tensor(sigma)), want) < 1e-5
    assert torch.allclose(D.log_density(x, sigma), density, rtol=1e-6, atol=2e-4)
    assert torch.allclose(D.entropy(x, sigma), entropy, atol=1e-4)


def test_plain_float32_would_not_be():
    """The test above can fail: without the second weighing it does."""
    points = pictures(1500).float()
    points = torch.cat([points, points + 0.006 * torch.nn.functional.normalize(normal(1500, 768, seed=3)).float()])
    x = points[:24] + 0.002 * normal(24, 768, seed=5).float()
    plain = Dataset(points, tolerance=math.inf)
    want, density, *_ = direct(points, x, 0.002)
    assert error(plain(x, torch.tensor(0.002)), want) > 1e-5
    assert float((plain.log_density(x, 0.002) - density).abs().max()) > 1


def test_many_ties_go_to_the_float64_pass():
    """More than `rerank` points share the weight where float32 is too coarse."""
    center = pictures(1)[0]
    points = (center + 0.002 * normal(300, 768, seed=1)).float()
    x = points[:4] + 0.02 * normal(4, 768, seed=2).float()
    D = Dataset(points, rerank=8)
    assert error(D(x, torch.tensor(0.02)) - points.mean(0), direct(points, x, 0.02)[0] - points.mean(0)) < 1e-3
    assert torch.allclose(D.entropy(x, 0.02), direct(points, x, 0.02)[2], atol=1e-6)


@pytest.mark.parametrize("sigma", [50.0, 1.0, 0.1])
def test_float64_is_the_mixture_without_width(sigma):
    points, x = normal(40, 3, 4, seed=1), normal(7, 3, 4, seed=2) * (1 + sigma)
    D, M = Dataset(points), Mixture(points, std=0.0)
    level = torch.tensor(sigma)
    assert torch.allclose(D(x, level), M(x, level), rtol=1e-10, atol=1e-12)
    assert torch.allclose(D.log_density(x, level), M.log_density(x, level), rtol=1e-10)
    assert torch.allclose(D.entropy(x, level), M.entropy(x, level), atol=1e-9)
    assert torch.allclose(D.weights(x, level), M.weights(x, level), atol=1e-10)


@given(
    st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.floats(0.05, 30.0), st.booleans(), st.integers(0, 99)
)
def test_blocks_change_nothing(count, dim, block, sigma, entropy, seed):
    points, x = normal(count, dim, seed=seed), 2 * normal(5, dim, seed=seed + 1)
    D = Dataset(points)
    whole, parts = (stream(some.points, D._query(x, sigma), 3, entropy) for some in (D, Dataset(points, block=block)))
    assert torch.allclose(whole.log_sum, parts.log_sum, rtol=1e-12, atol=1e-12)
    assert torch.allclose(whole.mean, parts.mean, rtol=1e-10, atol=1e-12)
    assert torch.allclose(whole.entropy, parts.entropy, atol=1e-10)
    assert torch.allclose(whole.top, parts.top, rtol=1e-12, atol=1e-12)


def test_points_may_stay_in_a_file_and_be_bytes(tmp_path):
    bytes_ = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "points.npy", bytes_.numpy())
    mapped = Dataset(np.load(tmp_path / "points.npy", mmap_mode="r"), block=16)
    wide = Dataset(bytes_.double() / 127.5 - 1)
    x = normal(6, 1, 4, 4)
    for sigma in (3.0, 0.1):
        assert torch.allclose(mapped(x, torch.tensor(sigma)), wide(x, torch.tensor(sigma)), atol=1e-12)
    assert torch.equal(mapped.nearest(x, 3)[1], wide.nearest(x, 3)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_and_top_are_brute_force(dtype):
    points = pictures(400).to(dtype)
    x = points[:9] + 0.3 * normal(9, 768, seed=4, dtype=dtype)
    want = torch.cdist(x.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distance, index = Dataset(points, block=64).nearest(x, 5)
    value, place = want.topk(5, largest=False)
    assert torch.equal(index, place)
    assert torch.allclose(distance, value, rtol=1e-9)
    weight, place = Dataset(points, block=64).top(x, 2.0, 4)
    known, order = direct(points, x, 2.0)[3].topk(4)
    assert torch.equal(place, order)
    assert torch.allclose(weight, known, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("law", [Dataset, lambda y: Gaussian(y[0], 0.01), lambda y: Mixture(y, std=0.1)])
def test_a_plain_number_keeps_its_digits(law):
    """0.002 in float32 is off by 5e-8 of it, which are nats in many dimensions far from the points."""
    D, x = law(normal(20, 3072, seed=1)), 3 * normal(2, 3072, seed=2)
    whole, half = torch.tensor(0.002, dtype=torch.float64), torch.tensor(0.002)
    assert torch.equal(D.log_density(x, 0.002), D.log_density(x, whole))
    assert torch.equal(D(x, 0.002), D(x, whole))
    if law is Dataset:
        assert float((D.log_density(x, half) - D.log_density(x, whole)).abs().min()) > 1
    else:
        assert torch.equal(D.score(x, 0.002), D.score(x, whole))


def test_each_sample_has_its_own_sigma():
    points, x = normal(30, 4), normal(3, 4, seed=1)
    D, levels = Dataset(points), torch.tensor([5.0, 0.7, 0.05])
    each = torch.cat([D(x[i : i + 1], level) for i, level in enumerate(levels)])
    assert torch.allclose(D(x, levels), each, atol=1e-12)


@pytest.mark.parametrize("sigma", [3.0, 0.6])
def test_derivatives_are_those_of_the_formula(sigma):
    points, x = normal(25, 3, seed=1), normal(4, 3, seed=2).requires_grad_()
    D, level = Dataset(points, block=7), torch.tensor(sigma, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: D(x, s), (x, level), atol=1e-6)
    plain = lambda x, s: torch.softmax(-((x[:, None] - points) ** 2).sum(2) / (2 * s**2), 1) @ points  # noqa: E731
    inputs, tangents = (x.detach(), level.detach()), (normal(4, 3, seed=3), torch.tensor(0.7, dtype=torch.float64))
    got, want = (torch.func.jvp(form, inputs, tangents) for form in (lambda x, s: D(x, s), plain))
    assert torch.allclose(got[0], want[0], atol=1e-12)
    assert torch.allclose(got[1], want[1], atol=1e-12)


def test_second_derivatives_are_right_too():
    points, x, level = normal(9, 2), normal(2, 2, seed=1).requires_grad_(), torch.tensor(0.9, dtype=torch.float64)
    D = Dataset(points, torch.arange(9) % 2)
    assert torch.autograd.gradgradcheck(lambda x: D(x, level), (x,), atol=1e-5)
    assert torch.autograd.gradgradcheck(lambda x: D(x, level, torch.tensor([0, 2])), (x,), atol=1e-5)


def test_entropy_rate_is_the_slope_along_the_exact_trajectory():
    points, x = normal(20, 3, seed=1), 2 * normal(5, 3, seed=2)
    D, sigma, step = Dataset(points), 1.3, 1e-5
    d = (x - D(x, torch.tensor(sigma, dtype=torch.float64))) / sigma
    ends = [D.entropy(x + side * step * d, torch.tensor(sigma + side * step, dtype=torch.float64)) for side in (1, -1)]
    assert torch.allclose(D.entropy_rate(x, sigma), (ends[0] - ends[1]) / (2 * step), atol=1e-7)


def test_classes_are_their_own_points():
    points, labels = normal(30, 4), torch.arange(30) % 3
    D, x, level = Dataset(points, labels, block=8), normal(6, 4, seed=1), torch.tensor(0.8)
    wanted = torch.tensor([0, 1, 2, 3, 3, 0])  # 3: all
    own = [Dataset(points[labels == c]) if c < 3 else Dataset(points) for c in wanted.tolist()]
    each = torch.cat([some(x[i : i + 1], level) for i, some in enumerate(own)])
    assert torch.allclose(D(x, level, wanted), each, atol=1e-12)
    assert torch.allclose(Labelled(D, torch.tensor(1))(x, level), own[1](x, level), atol=1e-12)
    few = Dataset(points.float() + 100, labels, block=8)  # float32, and the second weighing, keep to the class too
    assert torch.allclose(
        few(x.float() + 100, level / 100, wanted),
        torch.cat(
            [
                Dataset((points[labels == c] if c < 3 else points) + 100)(
                    x[i : i + 1].float().double() + 100, level / 100
                )
                for i, c in enumerate(wanted.tolist())
            ]
        ).float(),
        atol=1e-4,
    )


def test_entropy_and_density_keep_to_a_class():
    points, labels = normal(30, 4), torch.arange(30) % 3
    D, x, wanted = Dataset(points, labels, block=8), normal(5, 4, seed=1), torch.tensor([0, 1, 2, 3, 1])  # 3: all
    own = [Dataset(points[labels == c]) if c < 3 else Dataset(points) for c in wanted.tolist()]
    for ask in ("entropy", "log_density"):
        each = torch.cat([getattr(some, ask)(x[i : i + 1], 0.8) for i, some in enumerate(own)])
        assert torch.allclose(getattr(D, ask)(x, 0.8, wanted), each, atol=1e-12)


def test_blocks_of_large_points_are_small():
    """Images of 256×256×3: 1,024 of them would be 1.6 GB in float64, several times over."""
    large = Dataset(np.broadcast_to(np.zeros((3, 256, 256), np.uint8), (100, 3, 256, 256)))
    assert max(rows.stop - rows.start for rows in large.points.spans()) * large.points.dim <= 2**24
    assert float(large.points.radius) == pytest.approx(math.sqrt(3 * 2**16))


def test_runs_end_on_points():
    """[PDE] sec. 4.4: exact reversal of a finite set returns the set."""
    points = normal(12, 2, 3, seed=4)
    D = Dataset(points)
    x = fanal.noise(D.shape, range(16), sigma=80.0).double()
    end = fanal.sample(D, x, fanal.schedules.polynomial(40), fanal.solvers.Euler())
    assert float(D.nearest(end)[0].max()) < 1e-6


@pytest.mark.parametrize(
    ("points", "labels", "said"),
    [
        (torch.zeros(0, 3), None, "N >= 1"),
        (torch.zeros(3), None, "N, \\*shape"),
        ([[1.0]], None, "list"),
        (torch.tensor([[1.0], [math.nan]]), None, "point 1 of 2"),
        (torch.zeros(2, 3, dtype=torch.int64), None, "int64"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), "2 whole numbers"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), "2 whole numbers"),
    ],
)
def test_bad_points_are_refused(points, labels, said):
    with pytest.raises(FanalError, match=said):
        Dataset(points, labels)


def test_bad_questions_are_refused():
    D, x = Dataset(normal(5, 3), torch.arange(5)), normal(2, 3)
    for ask, said in (
        (lambda: D(x, torch.tensor(0.0)), "sigma > 0"),
        (lambda: D(x[:, :2], torch.tensor(1.0)), "expected a batch"),
        (lambda: D(x, torch.tensor(1.0), torch.tensor([0, 6])), "labels"),
        (lambda: Dataset(normal(6, 2), torch.arange(6), classes=5), "6 classes cannot be of 5"),
        (lambda: Dataset(normal(6, 2), classes=5), "0 classes cannot be of 5"),
        (lambda: Dataset(normal(6, 3), torch.arange(6), classes=9)(x, torch.tensor(1.0), torch.tensor(8)), "class 8"),
        (lambda: D(x, torch.tensor(1.0), torch.tensor([0, 1, 2])), "each of 2 samples"),
        (lambda: D(x, torch.tensor(1.0), torch.tensor([0.0, 1.5])), "whole numbers"),
        (lambda: Dataset(normal(5, 3))(x, torch.tensor(1.0), torch.tensor(0)), "no classes"),
        (lambda: Dataset(normal(2, 3), torch.tensor([0, 2]))(x, torch.tensor(1.0), torch.tensor(1)), "class 1 has no"),
        (lambda: D.nearest(x, 0), "k is a whole number"),
        (lambda: Dataset(normal(5, 3), block=0), "block"),
    ):
        with pytest.raises(FanalError, match=said):
            ask()


def test_a_fit_has_the_moments_of_its_points():
    points = pictures(500, dim=60).reshape(500, 3, 20)
    full = Gaussian.fit(points)
    assert full.shape == (3, 20)
    x, level = normal(4, 3, 20), torch.tensor(0.7)
    cov = torch.cov(points.flatten(1).T, correction=0)
    assert torch.allclose(full(x, level), Gaussian(points.mean(0), cov)(x, level), atol=1e-10)
    few = Gaussian.fit(points, rank=10)
    values, basis = torch.linalg.eigh(cov)
    low = LowRank(basis[:, -10:], values[-10:], float(values[:-10].mean()))
    assert torch.allclose(few(x, level), Gaussian(points.mean(0), low)(x, level), atol=1e-6)


def test_a_fit_in_many_dimensions_keeps_its_directions():
    """12,288 dimensions, as of an image of 64×64×3: the three known directions come back, and the noise beside them."""
    basis = torch.linalg.qr(normal(12288, 3, seed=1)).Q
    points = (normal(120, 3, seed=2) * torch.tensor([30.0, 20.0, 10.0])) @ basis.T + 0.01 * normal(120, 12288, seed=3)
    fit = Gaussian.fit(points.float(), rank=3)
    assert fit.cov.basis is not None
    assert float(torch.linalg.svdvals(fit.cov.basis.T @ basis).min()) > 0.999
    assert fit.cov.rest is not None
    assert float(fit.cov.rest) == pytest.approx(1e-4, rel=0.05)


def test_a_mixture_is_fitted_class_by_class():
    points, labels = torch.cat([normal(50, 3), 5 + normal(150, 3, seed=1)]), torch.arange(200).ge(50).long()
    M, x, level = Mixture.fit(points, labels), 3 * normal(5, 3, seed=2), torch.tensor(1.1)
    parts = [Gaussian.fit(points[labels == c]) for c in (0, 1)]
    own = torch.stack([part.log_density(x, level) for part in parts], 1) + torch.tensor([0.25, 0.75]).log()
    want = sum(w[:, None] * part(x, level) for w, part in zip(own.softmax(1).T, parts, strict=True))
    assert torch.allclose(M(x, level), want, atol=1e-10)
    with pytest.raises(FanalError, match="one point only"):
        Mixture.fit(points, torch.arange(200).clamp(max=198))
    with pytest.raises(FanalError, match="one label per point"):
        Mixture.fit(points, labels[:3])
    with pytest.raises(FanalError, match="rank"):
        Gaussian.fit(points, rank=3)


def test_one_pass_tells_all_three(monkeypatch):
    points, labels = pictures(200).float(), torch.arange(200) % 3
    D, x, wanted = (
        Dataset(points, labels),
        points[:5] + 0.8 * normal(5, 768, seed=2).float(),
        torch.tensor([0, 1, 2, 3, 0]),
    )
    apart = D(x, 0.8, wanted), D.log_density(x, 0.8, wanted), D.entropy(x, 0.8, wanted)
    passes, one = [], dataset.stream
    monkeypatch.setattr(dataset, "stream", lambda *words: passes.append(words) or one(*words))
    found = D.posterior(x, 80.0, wanted)
    assert len(passes) == 1
    found = D.posterior(x, 0.8, wanted)
    assert torch.equal(found.denoised, apart[0])
    assert torch.equal(found.log_density, apart[1])
    assert torch.equal(found.entropy, apart[2])


def test_an_empty_batch_has_no_neighbors():
    distance, index = Dataset(torch.randn(5, 3)).nearest(torch.empty(0, 3), 2)
    assert distance.shape == index.shape == (0, 2)
