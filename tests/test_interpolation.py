"""Points between noise: exact ends, the laws of variance and length, and paths of samples from the command line."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fanal.errors import FanalError
from fanal.interpolation import (
    METHODS,
    angle,
    coefficients,
    expected_distance,
    expected_length,
    expected_variance,
    in_distribution,
    length,
    linear,
    mean_square,
    measure_shift,
    n_linear,
    slerp,
    variance,
)
from fanal.seeding import noise

METHOD = pytest.mark.parametrize("method", METHODS)
WEIGHTS = torch.linspace(0, 1, 7, dtype=torch.float64)


def ends(d=(3, 4, 4), count=7, dtype=torch.float64):
    return noise(d, range(count), dtype=dtype), noise(d, range(100, 100 + count), dtype=dtype)


def at_angle(psi, d, count):
    """Independent lengths, and directions that are exactly psi apart."""
    a, b = ends((d,), count)
    u = a / a.norm(dim=1, keepdim=True)
    v = b - (u * b).sum(1, keepdim=True) * u
    v = v / v.norm(dim=1, keepdim=True)
    return a, b.norm(dim=1, keepdim=True) * (math.cos(psi) * u + math.sin(psi) * v)


@METHOD
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_are_exact(method, dtype):
    a, b = ends(dtype=dtype)
    assert torch.equal(METHODS[method](a, b, 0), a)
    assert torch.equal(METHODS[method](a, b, 1), b)
    mixed = METHODS[method](a, b, torch.tensor([0.0, 1, 0, 1, 0, 1, 0.5]))
    assert torch.equal(mixed[:6:2], a[:6:2])
    assert torch.equal(mixed[1:6:2], b[1:6:2])
    assert mixed.dtype == dtype


@METHOD
def test_a_path_back_is_the_path_turned_around(method):
    a, b = ends()
    torch.testing.assert_close(METHODS[method](a, b, WEIGHTS), METHODS[method](b, a, 1 - WEIGHTS), rtol=0, atol=1e-14)


@METHOD
def test_one_weight_per_sample_is_each_sample_alone(method):
    a, b = ends()
    whole = METHODS[method](a, b, WEIGHTS)
    for i, weight in enumerate(WEIGHTS.tolist()):
        torch.testing.assert_close(
            whole[i : i + 1], METHODS[method](a[i : i + 1], b[i : i + 1], weight), rtol=0, atol=1e-15
        )


@METHOD
def test_float32_ends_are_joined_in_float64(method):
    a, b = ends(dtype=torch.float32)
    want = METHODS[method](a.double(), b.double(), WEIGHTS).float()
    assert torch.equal(METHODS[method](a, b, WEIGHTS), want)


def test_the_printed_formulas():
    """[GEO] eqs. 50 to 53, written out with numpy, eq. 53 with (1 − α)²."""
    a, b = (np.asarray(x).reshape(7, -1) for x in ends())
    for i, alpha in enumerate(WEIGHTS.tolist()):
        x, y = a[i], b[i]
        psi = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        lam = alpha / np.sqrt(alpha**2 + (1 - alpha) ** 2)
        want = {
            "linear": (1 - alpha) * x + alpha * y,
            "slerp": np.sin((1 - alpha) * psi) / np.sin(psi) * x + np.sin(alpha * psi) / np.sin(psi) * y,
            "in_distribution": np.sqrt(1 - lam**2) * x + lam * y,
        }
        for method, value in want.items():
            got = METHODS[method](torch.tensor(x)[None], torch.tensor(y)[None], alpha)[0]
            np.testing.assert_allclose(np.asarray(got), value, rtol=0, atol=1e-13)


def test_slerp_keeps_a_shared_length_and_turns_evenly():
    """[GEO] remark 7, and the angle to the first end is αψ."""
    a, b = (x * 5 / x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for x in ends())
    for alpha in (0.1, 0.5, 0.8):
        x = slerp(a, b, alpha)
        torch.testing.assert_close(x.flatten(1).norm(dim=1), torch.full((7,), 5.0, dtype=torch.float64))
        torch.testing.assert_close(angle(a, x), alpha * angle(a, b))


@pytest.mark.parametrize("tilt", [0.0, 1e-9, 1e-6, 1e-3])
def test_slerp_of_nearly_parallel_ends_is_the_line(tilt):
    a = torch.eye(4, dtype=torch.float64)[:1]
    b = 3 * (a + tilt * torch.eye(4, dtype=torch.float64)[1:2])
    torch.testing.assert_close(slerp(a, b, 0.3), linear(a, b, 0.3), rtol=0, atol=2 * tilt**2 + 1e-12)


@pytest.mark.parametrize("psi", [0.0, 1e-9, 1e-5, 0.3, math.pi / 2, 3.0, math.pi - 1e-9, math.pi])
def test_angles_are_accurate_at_both_ends(psi):
    a = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[3 * math.cos(psi), 3 * math.sin(psi), 0.0]], dtype=torch.float64)
    assert float(angle(a, b)) == pytest.approx(psi, rel=1e-9, abs=1e-15)


def test_n_linear_of_two_ends_is_in_distribution():
    a, b = ends()
    for alpha in (0.0, 0.2, 0.5, 1.0):
        want = in_distribution(a, b, alpha)
        torch.testing.assert_close(n_linear([a, b], [1 - alpha, alpha]), want, rtol=0, atol=1e-14)


def test_n_linear_takes_any_scale_and_single_ends():
    parts = [noise((5,), range(k, k + 4), dtype=torch.float64) for k in (0, 10, 20)]
    x = n_linear(parts, [1, 2, 3])
    torch.testing.assert_close(x, (parts[0] + 2 * parts[1] + 3 * parts[2]) / math.sqrt(14))
    torch.testing.assert_close(n_linear(parts, torch.tensor([1e-200, 2e-200, 3e-200], dtype=torch.float64)), x)
    assert torch.equal(n_linear(parts, [0, 0.3, 0]), parts[1])
    torch.testing.assert_close(n_linear(parts[::-1], [3, 2, 1]), x)


def test_the_variance_laws_at_known_points():
    """The middle: half for linear, ½·sec²(ψ/2) for slerp (not 2·sec², as printed), 1 for in_distribution."""
    for psi in (0.4, 1.0, math.pi / 2, 2.5):
        assert float(variance("slerp", 0.5, psi)) == pytest.approx(0.5 / math.cos(psi / 2) ** 2, rel=1e-14)
        assert float(variance("slerp", 0.5, psi)) >= 0.5
    assert float(variance("linear", 0.5)) == 0.5
    torch.testing.assert_close(variance("linear", WEIGHTS), (1 - WEIGHTS) ** 2 + WEIGHTS**2)
    torch.testing.assert_close(variance("in_distribution", WEIGHTS), torch.ones_like(WEIGHTS))
    torch.testing.assert_close(variance("slerp", WEIGHTS), torch.ones_like(WEIGHTS))  # eq. 56


@METHOD
def test_the_variance_of_noise_follows_its_law(method):
    """200,000 values per law; the mean square of n normal values of variance f has error f·√(2/n): 5 of them."""
    a, b = ends((1000,), 200)
    for weight, psi in ((0.25, 1.0), (0.5, 1.3), (0.9, 2.0)):
        first, second = coefficients(method, weight, psi)
        f = float(variance(method, weight, psi))
        found = float((first * a + second * b).square().mean())
        assert abs(found - f) < 5 * f * math.sqrt(2 / a.numel())


@METHOD
@pytest.mark.parametrize("psi", [0.5, 1.5, 2.4])
def test_the_mean_square_at_an_angle_follows_its_law(method, psi):
    """4,000 pairs in four dimensions at one angle; five standard errors, and the short law is over five away."""
    x = METHODS[method](*at_angle(psi, 4, 4000), 0.5).square().sum(1) / 4
    error = float(x.std()) / math.sqrt(len(x))
    assert abs(float(x.mean()) - float(mean_square(method, 0.5, psi, 4))) < 5 * error
    if abs(math.cos(psi)) > 0.5:
        assert abs(float(x.mean()) - float(variance(method, 0.5, psi))) > 5 * error


def test_the_expected_variance_is_the_law_averaged_over_angles():
    """The integral against thousands of drawn angles, five standard errors; linear's needs no integral."""
    for d in (6, 16, 256):
        a, b = ends((d,), 4000 if d < 256 else 1000)
        drawn = mean_square("slerp", 0.3, angle(a, b), d)
        error = float(drawn.std()) / math.sqrt(len(drawn))
        assert abs(float(drawn.mean()) - expected_variance("slerp", 0.3, d)) < 5 * error
    assert expected_variance("linear", 0.25, 5) == 0.625
    assert expected_variance("in_distribution", 0.25, 2) == pytest.approx(1, abs=1e-15)
    assert expected_variance("slerp", 0.5, 2) == expected_variance("slerp", 0.5, 3) == math.inf
    assert expected_variance("slerp", 1.0, 2) == 1
    assert expected_variance("slerp", 0.5, 4) == pytest.approx(2 - 9 * math.pi / 32, rel=1e-10)
    for d in (5, 8, 64, 3072):  # halfway the integral is elementary: 1 + (1 − m)/(d − 3)
        lengths = float(mean_square("linear", 0.5, 0.0, d)) * 2 - 1
        assert expected_variance("slerp", 0.5, d) - 1 == pytest.approx((1 - lengths) / (d - 3), rel=1e-6)
    wide = [expected_variance("slerp", 0.5, d) for d in (4, 8, 64, 3072, 10**6)]
    assert wide == sorted(wide, reverse=True)
    assert abs(wide[-1] - 1) < 1e-9


def test_the_length_between_ends_at_an_angle():
    psi = torch.linspace(0.1, 3.0, 7, dtype=torch.float64)
    torch.testing.assert_close(length("linear", 0.5, psi), torch.cos(psi / 2))
    torch.testing.assert_close(length("in_distribution", 0.5, psi), math.sqrt(2) * torch.cos(psi / 2))
    torch.testing.assert_close(length("slerp", 0.3, psi), torch.ones(7, dtype=torch.float64))


def test_the_expected_length_at_known_points():
    """In three dimensions cos ψ is uniform: E cos(ψ/2) = 2/3, E cos²(ψ/2) = 1/2. In large ones the angle is right."""
    mean, error = expected_length("linear", 0.5, 3)
    assert mean == pytest.approx(2 / 3, rel=1e-9)
    assert error == pytest.approx(math.sqrt(0.5 - 4 / 3 + 1), rel=1e-9)
    assert expected_length("in_distribution", 0.5, 3)[0] == pytest.approx(2 * math.sqrt(2) / 3, rel=1e-9)
    for d in (100, 10_000):
        assert expected_length("in_distribution", 0.5, d)[1] == pytest.approx(0.5 / math.sqrt(d), rel=2 / d)
        assert expected_length("linear", 0.25, d)[0] == pytest.approx(math.sqrt(0.625), rel=1 / d)
    assert expected_length("slerp", 0.25, 5) == (1.0, 0.0)


@METHOD
@pytest.mark.parametrize("weight", [0.25, 0.5])
def test_the_shifts_of_noise_follow_their_laws(method, weight):
    """2,000 pairs in 64 dimensions: a distance of draws exceeds the true one by `chance` once in 100. That of slerp is
    the limit of large d, 0.013 off at d = 64 with 40,000 pairs. Lengths within 5 standard errors."""
    found = measure_shift(method, 64, weight=weight, count=2000)
    assert abs(found.distance - expected_distance(method, weight, 64)) < found.chance + 0.02 * (method == "slerp")
    mean, error = expected_length(method, weight, 64)
    assert found.length.value == pytest.approx(mean, abs=5 * found.length.se + 1e-12)
    assert found.length_error == pytest.approx(error, rel=0.1, abs=1e-12)  # of 2,000: 1.6 % standard error


def test_what_shifts_and_what_does_not():
    """[GEO] table 2 at d = 256, 1,000 pairs. in_distribution: distance below what chance exceeds once in 100."""
    plain, round_, kept = (measure_shift(method, 256, count=1000) for method in ("linear", "slerp", "in_distribution"))
    assert plain.distance > 0.99
    assert plain.length.value == pytest.approx(math.sqrt(0.5), abs=5 * plain.length.se)
    assert kept.distance < kept.chance < 0.06
    assert abs(kept.variance.value - 1) < 5 * kept.variance.se
    assert round_.length_error < 1e-12
    assert abs(round_.variance.value - 1) < 5 * round_.variance.se
    # halfway, slerp's squared length is the mean of two: half the spread, and max |Φ(√2·t) − Φ(t)| = 0.083 from noise
    assert abs(round_.distance - 0.083) < 0.045  # a distance of 1,000 draws exceeds the true one by 0.051 in 100
    assert round_.distance > round_.chance


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda a, b: linear(a, b, 1.5), "must lie in [0, 1], got 1.5"),
        (lambda a, b: linear(a, b, math.nan), "must lie in [0, 1]"),
        (lambda a, b: linear(a, b[:3], 0.5), "same shape and dtype"),
        (lambda a, b: linear(a, b.float(), 0.5), "same shape and dtype"),
        (lambda a, b: linear(a, b, torch.zeros(2)), "one weight, or one per sample"),
        (lambda a, b: linear(a[0, 0, 0], b[0, 0, 0], 0.5), "batches of shape"),
        (lambda a, b: slerp(a, -2 * a, 0.5), "opposite ends"),
        (lambda a, b: slerp(a, 0 * a, 0.5), "one is zero or not finite"),
        (lambda a, b: coefficients("slurp", 0.5), "did you mean 'slerp'"),
        (lambda a, b: variance("slerp", 0.5, 4.0), "lies in [0, π]"),
        (lambda a, b: n_linear([a, b], [1.0]), "2 finite weights"),
        (lambda a, b: n_linear([a, b], [0.0, 0.0]), "not all zero"),
        (lambda a, b: n_linear([], []), "batches of shape"),
        (lambda a, b: expected_variance("slerp", 0.5, 1), "at least 2"),
        (lambda a, b: expected_length("linear", 0.5, 1), "at least 2"),
        (lambda a, b: expected_distance("linear", 1.5, 4), "must lie in [0, 1]"),
        (lambda a, b: mean_square("slerp", 0.5, 1.0, 0), "at least 1"),
        (lambda a, b: measure_shift("slerp", 4, count=1), "at least 2 pairs"),
    ],
)
def test_what_does_not_work_is_named(call, told):
    with pytest.raises(FanalError) as error:
        call(*ends())
    assert told in str(error.value)
