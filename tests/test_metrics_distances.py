"""Distances between sets against closed forms, scikit-learn and scipy; their standard errors against repetition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from sklearn.neighbors import NearestNeighbors

from fanal.errors import FanalError
from fanal.metrics import (
    Statistics,
    density_coverage,
    fid,
    kid,
    median_distance,
    mmd,
    precision_recall,
    sliced_wasserstein,
)


def gauss(n, d, seed, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + shift


def moments(mean, cov, n=None):
    return Statistics(torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(cov, dtype=torch.float64), n)


def covariance(d, rank, seed):
    a = gauss(d, rank, seed)
    return a @ a.T / rank


def repeat(figure, n, m, d, times, shift=0.0, scale=1.0):
    """Values and standard errors of a figure on fresh Gaussian sets."""
    found = [figure(gauss(n, d, 2 * i, shift, scale), gauss(m, d, 2 * i + 1)) for i in range(times)]
    return np.array([f.value for f in found]), np.array([f.se for f in found])


# Fréchet distance


def test_fid_of_gaussians_with_the_same_axes_is_the_textbooks():
    a, b = torch.tensor([1.0, 4.0, 9.0, 0.0]), torch.tensor([4.0, 4.0, 1.0, 2.0])
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5])
    found = fid(moments(torch.zeros(4), torch.diag(a)), moments(shift, torch.diag(b)))
    assert found.value == pytest.approx(5.25 + float(((a.sqrt() - b.sqrt()) ** 2).sum()), rel=1e-12)
    assert math.isnan(found.se)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(12, 12), (12, 5), (3, 4)])
def test_fid_is_scipys_square_root_of_the_product(rank_a, rank_b):
    a, b = covariance(12, rank_a, 1), covariance(12, rank_b, 2)
    half = scipy.linalg.sqrtm(a.numpy())
    root = np.trace(np.real(scipy.linalg.sqrtm(np.real(half) @ b.numpy() @ np.real(half))))
    wanted = float(a.trace() + b.trace()) - 2 * root
    found = fid(moments(torch.zeros(12), a), moments(torch.zeros(12), b)).value
    assert found == pytest.approx(wanted, rel=1e-5 if min(rank_a, rank_b) < 12 else 1e-10)


def test_fid_of_a_set_with_itself_is_zero_whatever_its_rank():
    for n, d in ((50, 8), (8, 50)):
        x = gauss(n, d, 0) * 100
        assert fid(x, x).value == pytest.approx(0, abs=1e-8)
    point = torch.ones(9, 3)
    assert fid(point, point + 2).value == pytest.approx(12, rel=1e-12)


@given(st.integers(0, 2**16), st.floats(0.1, 10))
def test_fid_does_not_care_for_rotations_and_scales_as_a_square(seed, scale):
    x, y = gauss(40, 5, seed), gauss(30, 5, seed + 1, 0.3, 1.5)
    turn, _ = torch.linalg.qr(gauss(5, 5, seed + 2))
    base = fid(x, y)
    turned = fid(scale * x @ turn + 3, scale * y @ turn + 3)
    assert turned.value == pytest.approx(scale**2 * base.value, rel=1e-8)
    assert turned.se == pytest.approx(scale**2 * base.se, rel=1e-6)
    assert fid(y, x).value == pytest.approx(base.value, rel=1e-9)


def test_fewer_samples_than_features_give_a_figure_and_a_warning():
    x, y = gauss(20, 64, 0), gauss(30, 64, 1)
    found = fid(x, y)
    a, b = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    nuclear = float(torch.linalg.svdvals(a @ b.T).sum())
    wanted = float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()) - 2 * nuclear
    assert found.value == pytest.approx(wanted, rel=1e-9)
    assert math.isnan(found.se)
    assert "20 samples are not more than the 64 features" in found.warning
    assert fid(gauss(65, 64, 2), gauss(99, 64, 3)).warning == ""


def test_the_error_of_fid_is_the_jackknifes():
    x, y = gauss(150, 3, 0, 0.5, 1.3), gauss(120, 3, 1)
    parts = []
    for i, side in enumerate((x, y)):
        n = len(side)
        left = [torch.cat([side[:k], side[k + 1 :]]) for k in range(n)]
        values = np.array([fid(*((z, y) if i == 0 else (x, z))).value for z in left])
        parts.append((n - 1) / n * ((values - values.mean()) ** 2).sum())
    assert fid(x, y).se == pytest.approx(math.sqrt(sum(parts)), rel=0.03)


@pytest.mark.parametrize(("shift", "scale", "low", "high"), [(0.5, 1.2, 0.85, 1.25), (0.0, 1.0, 1.1, 1.7)])
def test_the_error_of_fid_is_what_repetition_shows(shift, scale, low, high):
    # The spread of 200 repetitions is known to 5 %. Where the sets agree, the first order vanishes and the error is
    # up to √2 too large.
    values, errors = repeat(fid, 200, 300, 6, 200, shift, scale)
    assert low < errors.mean() / values.std() < high


def test_fid_of_many_samples_comes_near_the_closed_form():
    found = fid(gauss(20000, 4, 0, 0.5, 1.5), gauss(20000, 4, 1))
    assert found.value == pytest.approx(4 * (0.25 + 0.25), abs=4 * found.se)  # the bias is below 0.1 standard errors
    assert found.se < 0.04


def test_a_side_without_features_counts_as_exact():
    x, y = gauss(200, 3, 0, 0.5), gauss(200, 3, 1)
    bare = Statistics.of(y, keep=False)
    whole, half = fid(x, y), fid(x, bare)
    assert half.value == pytest.approx(whole.value, rel=1e-12)
    assert half.se < whole.se
    assert "leaves out" in half.warning
    assert half.n_real == 200


# Sliced Wasserstein


@given(st.integers(0, 2**16), st.integers(2, 40), st.integers(2, 40))
def test_along_a_line_it_is_scipys(seed, n, m):
    x, y = gauss(n, 1, seed), gauss(m, 1, seed + 1, 0.4, 2)
    found = sliced_wasserstein(x, y, order=1, directions=2)
    assert found.value == pytest.approx(scipy.stats.wasserstein_distance(x[:, 0], y[:, 0]), rel=1e-10)


@given(st.integers(0, 2**16), st.integers(2, 12), st.integers(2, 12))
def test_sets_of_unlike_size_are_compared_exactly(seed, n, m):
    """Repeating each sample until the sizes agree does not change an empirical distribution."""
    x, y = gauss(n, 3, seed), gauss(m, 3, seed + 1, 0.4, 2)
    found = sliced_wasserstein(x, y, directions=8)
    alike = sliced_wasserstein(x.repeat_interleave(m, 0), y.repeat_interleave(n, 0), directions=8)
    assert found.value == pytest.approx(alike.value, rel=1e-10)


def test_shifted_sets_are_as_far_apart_as_the_shift():
    x, shift = gauss(500, 6, 0), torch.tensor([3.0, 0, 0, 4.0, 0, 0])
    found = sliced_wasserstein(x, x + shift, directions=4000)
    assert found.value == pytest.approx(5 / math.sqrt(6), abs=4 * found.se)
    assert found.se < 0.04
    assert sliced_wasserstein(x, x, directions=8).value == 0


def test_sliced_w2_of_gaussians_is_the_closed_form():
    # Along any direction of N(m, s²I) and N(0, I): W2² = (θᵀm)² + (s − 1)².
    x, y = gauss(6000, 4, 0, 0.5, 1.5), gauss(6000, 4, 1)
    found = sliced_wasserstein(x, y, directions=256)
    assert found.value == pytest.approx(math.sqrt(0.25 + 0.25), abs=4 * found.se)
    assert found.se < 0.03


@pytest.mark.parametrize("order", [1, 2])
def test_the_error_of_sliced_wasserstein_is_what_repetition_shows(order):
    found = [
        sliced_wasserstein(gauss(200, 4, 2 * i, 0.5, 1.2), gauss(300, 4, 2 * i + 1), order=order, directions=32, seed=i)
        for i in range(200)
    ]
    spread = np.std([f.value for f in found])  # known to 5 %
    assert np.mean([f.se for f in found]) == pytest.approx(spread, rel=0.2)


# Kernels


def by_hand(xx, yy, xy):
    n, m = xy.shape
    own = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return own - 2 * xy.sum() / (n * m)


def test_kid_is_scikit_learns_kernel_over_all_pairs():
    x, y = gauss(1500, 5, 0, 0.2), gauss(40, 5, 1)
    pairs = [polynomial_kernel(a, b, degree=3, coef0=1) for a, b in ((x, x), (y, y), (x, y))]  # gamma is 1/d
    assert kid(x, y).value == pytest.approx(by_hand(*pairs), rel=1e-10)


def test_mmd_is_scikit_learns_kernel_over_all_pairs():
    x, y = gauss(50, 5, 0, 100.2), gauss(40, 5, 1, 100.0)
    width = median_distance(x, y)
    assert width == pytest.approx(np.median(pdist(torch.cat([x, y]).numpy())), rel=0.01)
    pairs = [rbf_kernel(a, b, gamma=1 / (2 * width**2)) for a, b in ((x, x), (y, y), (x, y))]
    assert mmd(x, y).value == pytest.approx(by_hand(*pairs), rel=1e-6)
    assert mmd(x, y, bandwidth=width).value == mmd(x, y).value


@pytest.mark.parametrize("distance", [kid, mmd])
def test_the_error_of_a_kernel_distance_is_the_jackknifes(distance):
    options = {"bandwidth": 1.5} if distance is mmd else {}
    x, y = gauss(30, 3, 0, 0.5), gauss(25, 3, 1)
    parts = []
    for i, side in enumerate((x, y)):
        n = len(side)
        left = [torch.cat([side[:k], side[k + 1 :]]) for k in range(n)]
        values = np.array([distance(*((z, y) if i == 0 else (x, z)), **options).value for z in left])
        parts.append((n - 1) / n * ((values - values.mean()) ** 2).sum())
    assert distance(x, y, **options).se == pytest.approx(math.sqrt(sum(parts)), rel=1e-8)


@pytest.mark.parametrize(("subsets", "low", "high"), [(None, 1.1, 1.7), (10, 0.8, 1.2)])
def test_kid_is_zero_on_average_where_the_sets_agree(subsets, low, high):
    values, errors = repeat(lambda x, y: kid(x, y, subsets=subsets), 100, 140, 6, 300)
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(300)
    assert low < errors.mean() / values.std() < high  # known to 4 %; over all pairs it is up to √2 too large


def test_subsets_of_kid_are_disjoint_and_averaged():
    x, y = gauss(60, 3, 0, 0.3), gauss(45, 3, 1)
    random = np.random.default_rng(7)
    parts = [side[torch.from_numpy(random.permutation(len(side)))].tensor_split(5) for side in (x, y)]
    each = np.array([kid(a, b).value for a, b in zip(*parts, strict=True)])
    found = kid(x, y, subsets=5, seed=7)
    assert found.value == pytest.approx(each.mean(), rel=1e-12)
    assert found.se == pytest.approx(each.std(ddof=1) / math.sqrt(5), rel=1e-12)
    assert (found.n, found.n_real) == (60, 45)


def test_mmd_of_gaussians_is_the_closed_form():
    d, h, shift, scale = 3, 1.3, 0.4, 1.5

    def expected(variance, square):
        return (h**2 / (h**2 + variance)) ** (d / 2) * math.exp(-square / (2 * (h**2 + variance)))

    truth = expected(2 * scale**2, 0) + expected(2, 0) - 2 * expected(1 + scale**2, d * shift**2)
    values, errors = repeat(lambda x, y: mmd(x, y, bandwidth=h), 150, 150, d, 300, shift, scale)
    assert values.mean() == pytest.approx(truth, abs=4 * values.std() / math.sqrt(300))
    assert errors.mean() == pytest.approx(values.std(), rel=0.15)  # known to 4 %


# Nearest neighbors


def brute(x, real, k):
    """Precision, recall, density and coverage from scikit-learn's neighbors."""

    def inside(points, centers):
        near = NearestNeighbors(n_neighbors=k + 1).fit(centers)
        radius = near.kneighbors(centers)[0][:, k]
        return np.linalg.norm(points[:, None] - centers, axis=-1) <= radius

    held = inside(x, real)
    return held.any(1).mean(), inside(real, x).any(1).mean(), held.sum(1).mean() / k, held.any(0).mean()


@given(st.integers(0, 2**16), st.integers(14, 60), st.integers(14, 60), st.integers(1, 5))
def test_neighbors_are_scikit_learns(seed, n, m, k):
    x, real = gauss(n, 2, seed, 50.3), gauss(m, 2, seed + 1, 50.0)
    found = [*precision_recall(x, real, k=k), *density_coverage(x, real, k=k)]
    assert [f.value for f in found] == pytest.approx(brute(x.numpy(), real.numpy(), k), rel=1e-12)


def test_constructed_sets_have_the_figures_that_they_must():
    grid = torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0))
    far = grid[:30] + 1000
    mixed = torch.cat([grid[:70] + 0.1, far])  # 70 samples on the real grid, 30 nowhere near it
    precision, recall = precision_recall(mixed, grid)
    assert (precision.value, recall.value) == (0.7, 0.8)  # the next row lies 0.9 away from the seven that are covered
    density, coverage = density_coverage(far, grid)
    assert (density.value, coverage.value) == (0, 0)
    assert coverage.se > 0  # nothing of 100 is not certainty
    one = torch.zeros(40, 2)
    assert [f.value for f in precision_recall(one, grid)] == [1, 0.01]  # one mode: precise, and nothing recalled
    copied = precision_recall(grid, grid)
    assert [f.value for f in copied] == [1, 1]
    blank = torch.zeros(20, 3) + 1e6
    assert [f.value for f in density_coverage(blank, blank)] == [4, 1]  # 20 of 20 balls of radius zero, k = 5


def test_density_and_coverage_of_equal_distributions_are_as_expected():
    n, m, k = 40, 50, 5
    found = [density_coverage(gauss(n, 3, 2 * i), gauss(m, 3, 2 * i + 1)) for i in range(150)]
    density, coverage = np.array([[figure.value for figure in pair] for pair in found]).T
    missed = math.prod((m - i) / (n + m - i) for i in range(1, k + 1))
    assert density.mean() == pytest.approx(1, abs=4 * density.std() / math.sqrt(150))
    assert coverage.mean() == pytest.approx(1 - missed, abs=4 * coverage.std() / math.sqrt(150))


def test_the_errors_of_neighbor_figures_are_what_repetition_shows():
    found = []
    for i in range(80):
        x, real = gauss(200, 4, 2 * i, 0.3, 1.1), gauss(200, 4, 2 * i + 1)
        found.append([(f.value, f.se) for f in (*precision_recall(x, real), *density_coverage(x, real))])
    values, errors = np.array(found).transpose(2, 0, 1)
    ratio = errors.mean(0) / values.std(0)  # known to 8 %; halves overstate the error by up to two fifths
    assert (ratio > 0.75).all(), ratio
    assert (ratio < 1.6).all(), ratio


# Refusals


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: fid(torch.zeros(1, 3), torch.zeros(5, 3)), ["at least 2 samples", "got 1"]),
        (lambda: fid(torch.zeros(5, 3), torch.zeros(5, 4)), ["different lengths", "3 and 4"]),
        (lambda: kid(torch.zeros(5, 3), torch.zeros(5, 4)), ["one length, got 3 and 4"]),
        (lambda: kid(torch.zeros(5, 3), torch.full((5, 3), torch.nan)), ["sample 0", "NaN"]),
        (lambda: kid(gauss(20, 2, 0), gauss(20, 2, 1), subsets=9), ["[2, 6]", "got 9"]),
        (lambda: mmd(torch.zeros(5, 3), torch.zeros(5, 3)), ["median distance is 0", "bandwidth"]),
        (lambda: mmd(gauss(5, 3, 0), gauss(5, 3, 1), bandwidth=-1), ["positive", "-1"]),
        (lambda: precision_recall(gauss(7, 2, 0), gauss(9, 2, 1)), ["at least 8 samples", "got 7"]),
        (lambda: precision_recall(gauss(9, 2, 0), gauss(9, 2, 1), k=0), ["k must be at least 1"]),
        (lambda: sliced_wasserstein(gauss(9, 2, 0), gauss(9, 2, 1), order=3), ["1 or 2, got 3"]),
        (lambda: sliced_wasserstein(gauss(9, 2, 0), gauss(9, 2, 1), directions=1), ["at least 2 directions"]),
        (lambda: fid(torch.zeros(5, 3, 3), torch.zeros(5, 3)), ["(N, D)", "(5, 3, 3)"]),
        (lambda: fid(torch.zeros(3, 9000), torch.zeros(3, 9000)), ["9000 features", "at most 8192"]),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(call, parts):
    with pytest.raises(FanalError) as error:
        call()
    for part in parts:
        assert part in str(error.value)
