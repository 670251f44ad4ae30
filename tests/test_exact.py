"""Closed forms against high-precision arithmetic, against each other, and against the calculus they obey."""

import math
import time

import mpmath
import pytest
import torch

from fanal.denoiser import Model, score
from fanal.errors import FanalError
from fanal.exact import Gaussian, LowRank, Mixture
from problems import gaussian, mixture

F64 = torch.float64
SIGMAS = [0.002, 0.05, 1.0, 7.0, 80.0]


def level(value):
    return torch.tensor(value, dtype=F64)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def points(count, dim, sigma):
    """Points as noisy as a run at sigma sees them."""
    return normal(count, dim, seed=1) * math.sqrt(1 + sigma**2)


def rotation(dim, seed=3):
    return torch.linalg.qr(normal(dim, dim, seed=seed))[0]


def precise(means, weights, covs, x, sigma):
    """Posterior mean, log density and component weights of one point, with 50 digits."""
    with mpmath.workdps(50):
        s2 = mpmath.mpf(sigma) ** 2
        point = mpmath.matrix(x.tolist())
        total = sum(mpmath.mpf(w) for w in weights)
        joint, parts = [], []
        for mean, weight, cov in zip(means.tolist(), weights, covs, strict=True):
            data = mpmath.matrix(cov.tolist())
            noisy = data + s2 * mpmath.eye(len(mean))
            centred = point - mpmath.matrix(mean)
            pulled = mpmath.lu_solve(noisy, centred)
            logdet = mpmath.log(mpmath.det(noisy))
            quadratic = (centred.T * pulled)[0]
            joint.append(
                mpmath.log(mpmath.mpf(weight) / total)
                - (quadratic + logdet + len(mean) * mpmath.log(2 * mpmath.pi)) / 2
            )
            parts.append(mpmath.matrix(mean) + data * pulled)
        top = max(joint)
        norm = sum(mpmath.exp(j - top) for j in joint)
        share = [mpmath.exp(j - top) / norm for j in joint]
        out = sum((w * p for w, p in zip(share, parts, strict=True)), mpmath.matrix(len(x), 1))
        as_tensor = torch.tensor([float(v) for v in out], dtype=F64)
        return as_tensor, float(top + mpmath.log(norm)), torch.tensor([float(w) for w in share], dtype=F64)


def assert_close(got, want, rtol=1e-10):
    """Relative to the size of the whole vector: single entries may pass through 0."""
    assert got.dtype == want.dtype
    assert float((got - want).norm()) <= rtol * float(want.norm())


def forms():
    """One covariance in every form that can hold it, by name."""
    q = rotation(4)
    values = torch.tensor([2.0, 0.7, 0.1, 0.1], dtype=F64)
    full = q @ torch.diag(values) @ q.T
    diagonal = torch.tensor([1.5, 0.3, 0.02, 0.02], dtype=F64)
    axes = torch.eye(4, dtype=F64)
    return {
        "full": (full, [full, LowRank(q[:, :2], values[:2], 0.1), LowRank(q, values)]),
        "diagonal": (
            torch.diag(diagonal),
            [diagonal, torch.diag(diagonal), LowRank(axes[:, :2], diagonal[:2], 0.02), LowRank(axes, diagonal, 5.0)],
        ),
        "scalar": (
            0.3 * axes,
            [
                0.3,
                torch.full((4,), 0.3, dtype=F64),
                0.3 * axes,
                LowRank(axes[:, :1], torch.tensor([0.3], dtype=F64), 0.3),
            ],
        ),
    }


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("kind", ["full", "diagonal", "scalar"])
def test_every_form_of_a_covariance_matches_high_precision(kind, sigma):
    dense, equals = forms()[kind]
    mean = normal(4, seed=5)
    x = points(3, 4, sigma)
    want = [precise(mean[None], [1.0], [dense], p, sigma) for p in x]
    denoised = torch.stack([w[0] for w in want])
    density = torch.tensor([w[1] for w in want], dtype=F64)
    exact_score = torch.stack([-torch.linalg.solve(dense + sigma**2 * torch.eye(4, dtype=F64), p - mean) for p in x])
    for cov in equals:
        for D in (Gaussian(mean, cov), Mixture(mean[None], cov=[cov])):
            assert_close(D(x, level(sigma)), denoised)
            assert_close(D.log_density(x, level(sigma)), density)
        assert_close(Gaussian(mean, cov).score(x, level(sigma)), exact_score)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("form", ["std", "cov"])
def test_mixture_matches_high_precision(form, sigma):
    means, weights, std = normal(5, 3, seed=2), [0.1, 0.5, 0.2, 0.15, 0.05], [0.3, 0.05, 0.5, 0.2, 0.4]
    covs = [torch.eye(3, dtype=F64) * s**2 for s in torch.tensor(std, dtype=F64)]
    if form == "cov":
        roots = [rotation(3, seed) * torch.tensor([0.7, 0.3, 0.1], dtype=F64) for seed in range(5)]
        covs = [root @ root.T for root in roots]
    D = (
        Mixture(means, weights, std=torch.tensor(std, dtype=F64))
        if form == "std"
        else Mixture(means, weights, cov=covs)
    )
    x = torch.cat([points(3, 3, sigma), (means[0] + means[1])[None] / 2 + 1e-3])
    want = [precise(means, weights, covs, p, sigma) for p in x]
    assert_close(D(x, level(sigma)), torch.stack([w[0] for w in want]))
    assert_close(D.log_density(x, level(sigma)), torch.tensor([w[1] for w in want], dtype=F64))
    assert_close(D.weights(x, level(sigma)), torch.stack([w[2] for w in want]))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_cov_and_std_are_the_same_mixture(sigma):
    m = mixture()
    other = Mixture(m.means, m.prior, cov=m.std**2)
    x = points(16, 2, sigma)
    for name in ("__call__", "score", "log_density", "weights", "entropy"):
        a, b = getattr(m, name)(x, level(sigma)), getattr(other, name)(x, level(sigma))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("D", [gaussian(), mixture(), Mixture(normal(3, 2), cov=[0.1, 0.2, 0.3])], ids=["g", "m", "mc"])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_float32_in_loses_nothing_but_the_last_rounding(D, sigma):
    """Everything is accumulated in float64: a float32 answer is the float64 one for the same input, rounded."""
    x = points(16, D.shape[0], sigma).float()
    for name in ("__call__", "score"):
        wide, narrow = getattr(D, name)(x.double(), level(sigma)), getattr(D, name)(x, level(sigma))
        assert narrow.dtype == torch.float32
        assert torch.equal(narrow, wide.float())
    assert D.log_density(x, level(sigma)).dtype == F64


@pytest.mark.parametrize("D", [gaussian(), mixture(), Mixture(normal(3, 2), cov=[0.1, 0.2, 0.3])], ids=["g", "m", "mc"])
@pytest.mark.parametrize("sigma", [0.05, 1.0, 80.0])
def test_score_is_the_gradient_of_log_density(D, sigma):
    x = points(8, D.shape[0], sigma).requires_grad_()
    (gradient,) = torch.autograd.grad(D.log_density(x, level(sigma)).sum(), x)
    x = x.detach()
    torch.testing.assert_close(D.score(x, level(sigma)), gradient, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(score(x, D(x, level(sigma)), level(sigma)), gradient, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 5.0])
def test_log_density_integrates_to_one(sigma):
    """The trapezoid rule is spectrally exact on a grid that is fine and wide against the density."""
    cov = [torch.tensor([[0.3, 0.1], [0.1, 0.2]]), LowRank(torch.tensor([[0.6], [0.8]]), torch.tensor([0.5]), 0.1), 0.2]
    D = Mixture(normal(3, 2), [1.0, 2.0, 3.0], cov=cov)
    width = 10 + 10 * sigma
    axis = torch.linspace(-width, width, 401, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    mass = D.log_density(grid, level(sigma)).exp().sum() * float(axis[1] - axis[0]) ** 2
    assert abs(float(mass) - 1) < 1e-6


def test_one_component_is_a_gaussian():
    mean, x = normal(3, seed=4), points(6, 3, 1.0)
    for cov in (0.4, torch.tensor([0.1, 0.2, 0.3], dtype=F64)):
        g, m = Gaussian(mean, cov), Mixture(mean[None], [7.0], cov=[cov])
        for name in ("__call__", "score", "log_density"):
            a, b = getattr(g, name)(x, level(0.3)), getattr(m, name)(x, level(0.3))
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


IMAGE = LowRank(rotation(16)[:, :3], torch.tensor([1.0, 0.5, 0.2], dtype=F64), 0.01)
IMAGES = {
    "gaussian-low-rank": Gaussian(normal(1, 4, 4), IMAGE),
    "gaussian-diagonal": Gaussian(normal(1, 4, 4), normal(16).abs()),
    "mixture-std": Mixture(normal(3, 1, 4, 4), std=torch.tensor([0.1, 0.2, 0.3])),
    "mixture-cov": Mixture(normal(3, 1, 4, 4), cov=[IMAGE, 0.3, normal(16).abs()]),
}


@pytest.mark.parametrize("D", IMAGES.values(), ids=IMAGES)
def test_image_shapes_and_one_sigma_per_sample(D):
    x = normal(5, 1, 4, 4, seed=8) * 3
    sigmas = torch.tensor([0.002, 0.1, 1.0, 5.0, 80.0], dtype=F64)
    methods = ["__call__", "score", "log_density", *(["weights", "entropy"] if isinstance(D, Mixture) else [])]
    for name in methods:
        together = getattr(D, name)(x, sigmas)
        alone = torch.cat([getattr(D, name)(x[b : b + 1], sigmas[b]) for b in range(5)])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-13)
    assert D(x, sigmas).shape == x.shape
    assert isinstance(D, Model)
    assert (D.shape, D.sigma_min, D.sigma_max) == ((1, 4, 4), 0.002, 80.0)


def test_image_is_its_flat_self():
    x = normal(5, 1, 4, 4, seed=8)
    D = IMAGES["mixture-cov"]
    flat = Mixture(D.means, cov=[IMAGE, 0.3, normal(16).abs()])
    assert torch.equal(D(x, level(0.5)).flatten(1), flat(x.flatten(1), level(0.5)))


def test_low_rank_holds_large_data():
    """d = 12,288: `D − μ = Σ(x − D)/sigma²` exactly, and no (d, d) matrix is formed."""
    dim, rank = 12_288, 16
    basis = torch.linalg.qr(normal(dim, rank))[0]
    values = torch.linspace(5, 0.5, rank, dtype=F64)
    mean = normal(3, 64, 64, seed=6)
    x = normal(4, 3, 64, 64, seed=7) * 3
    began = time.perf_counter()
    D = Gaussian(mean, LowRank(basis, values, 0.04))
    for sigma in (0.01, 1.0, 80.0):
        denoised = D(x, level(sigma))
        residual = ((x - denoised) / sigma**2).flatten(1)
        along = residual @ basis
        product = (along * values) @ basis.T + 0.04 * (residual - along @ basis.T)
        assert_close((denoised - mean).flatten(1), product)
        D.log_density(x, level(sigma))
    assert time.perf_counter() - began < 5  # about 0.1 s; a dense eigendecomposition would take minutes


@pytest.mark.parametrize("cov", [*forms()["full"][1], *forms()["diagonal"][1]])
def test_gaussian_solution_obeys_the_ode(cov):
    """Its derivative in sigma is (x − D)/sigma, it starts at x, and two legs make one."""
    D = Gaussian(normal(4, seed=5), cov)
    x, begin = points(3, 4, 5.0), level(5.0)
    for end in (0.01, 0.7, 5.0, 30.0):
        at = level(end)
        state, speed = torch.func.jvp(lambda s: D.solution(x, begin, s), (at,), (torch.ones_like(at),))
        torch.testing.assert_close(speed, (state - D(state, at)) / at, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(D.solution(state, at, level(0.2)), D.solution(x, begin, level(0.2)))
    torch.testing.assert_close(D.solution(x, begin, begin), x, rtol=1e-13, atol=1e-13)


def test_gaussian_solution_carries_the_law():
    """The trajectory maps N(μ, Σ + sigma²) onto N(μ, Σ + sigma'²): log density changes by the same constant."""
    D = gaussian()
    x = points(6, 3, 5.0)
    change = D.log_density(D.solution(x, level(5.0), level(0.1)), level(0.1)) - D.log_density(x, level(5.0))
    torch.testing.assert_close(change, change[:1].expand(6), rtol=1e-10, atol=0)


def test_weights_and_entropy():
    m = mixture()
    x = points(20, 2, 1.0)
    weights = m.weights(x, level(0.7))
    torch.testing.assert_close(weights.sum(1), torch.ones(20, dtype=F64))
    torch.testing.assert_close(m.entropy(x, level(0.7)), -(weights * weights.log()).sum(1))
    torch.testing.assert_close(m.weights(x, level(1e6)), m.prior.expand(20, 4), rtol=1e-5, atol=0)
    far = Mixture(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), std=0.1)
    assert torch.equal(far.entropy(far.means, level(0.01)), torch.zeros(2, dtype=F64))
    half = far.entropy(torch.tensor([[4.5, 2.0]]).double(), level(0.01))
    torch.testing.assert_close(half, level(math.log(2)).expand(1))


def test_mixture_limits():
    """At small sigma near a mean D stays with that component; at large sigma it is the mean of the data."""
    m = mixture()
    x = points(5, 2, 1.0)
    torch.testing.assert_close(m(x, level(1e7)), (m.prior @ m.means).expand(5, 2), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(m(x, level(1e-6)), x, rtol=1e-9, atol=1e-9)


def test_chunks_change_nothing(monkeypatch):
    """Many means are visited a few at a time."""
    D = Mixture(normal(50, 3), std=0.2)
    x = points(7, 3, 1.0)
    whole = D(x, level(0.5))
    monkeypatch.setattr("fanal.exact.mixture._CHUNK", 7 * 3 * 4)
    assert torch.equal(D(x, level(0.5)), whole)


def test_nearest_is_brute_force():
    D = Mixture(normal(30, 2, 3), std=0.1)
    x = normal(6, 2, 3, seed=9)
    distance, index = D.nearest(x, k=4)
    table = ((x[:, None] - D.means.reshape(30, 2, 3)) ** 2).sum((2, 3)).sqrt()
    ranked = table.sort(1)
    torch.testing.assert_close(distance, ranked.values[:, :4])
    assert torch.equal(index, ranked.indices[:, :4])
    assert D.nearest(x, k=99)[0].shape == (6, 30)


@pytest.mark.parametrize("form", ["std", "cov"])
def test_draw_has_the_moments(form):
    """200,000 draws: the mean and every entry of the covariance within 5 standard errors."""
    means, weights = normal(3, 2), torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    root = torch.tensor([[0.5, 0.2], [0.0, 0.3]], dtype=F64)
    low = LowRank(torch.tensor([[0.6], [0.8]], dtype=F64), torch.tensor([0.5], dtype=F64), 0.1)
    low_dense = 0.5 * low.basis @ low.basis.T + 0.1 * (torch.eye(2, dtype=F64) - low.basis @ low.basis.T)
    if form == "std":
        D = Mixture(means, weights, std=torch.tensor([1.5, 0.1, 0.05], dtype=F64))
        covs = [s**2 * torch.eye(2, dtype=F64) for s in (1.5, 0.1, 0.05)]
    else:
        covs = [root @ root.T, low_dense, 0.2 * torch.eye(2, dtype=F64)]
        D = Mixture(means, weights, cov=[covs[0], low, 0.2])
    n = 200_000
    x = D.draw(n, seed=1)
    mean = weights @ means
    centred = means - mean
    cov = sum(w * (c + torch.outer(m, m)) for w, c, m in zip(weights, covs, centred, strict=True))
    assert ((x.mean(0) - mean).abs() < 5 * (cov.diagonal() / n).sqrt()).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None]
    assert ((products.mean(0) - cov).abs() < 5 * products.std(0) / math.sqrt(n)).all()
    assert torch.equal(D.draw(10, seed=1), D.draw(10, seed=1))
    assert not torch.equal(D.draw(10, seed=1), D.draw(10, seed=2))


def test_gradients_reach_x_and_sigma():
    for D in (gaussian(), mixture(), IMAGES["mixture-cov"]):
        x = normal(2, *D.shape, seed=11).requires_grad_()
        sigma = torch.tensor([0.5, 2.0], dtype=F64, requires_grad=True)
        assert torch.autograd.gradcheck(D, (x, sigma))
        assert torch.autograd.gradcheck(D.log_density, (x, sigma))


EYE = torch.eye(3, dtype=F64)


@pytest.mark.parametrize(
    ("cov", "match"),
    [
        (-1.0, "negative"),
        (math.nan, "finite"),
        (torch.tensor([1.0, -0.1, 1.0]), "negative"),
        (torch.ones(2), "d = 3"),
        (torch.ones(2, 2), "d = 3"),
        (EYE + torch.tensor([[0.0, 0.5, 0.0], [0.0] * 3, [0.0] * 3]), "symmetric"),
        (torch.diag(torch.tensor([1.0, 1.0, -0.5])), "semi-definite"),
        (LowRank(EYE[:2], torch.ones(3)), "low-rank"),
        (LowRank(EYE[:, :2], torch.ones(3)), "low-rank"),
        (LowRank(2 * EYE, torch.ones(3)), "orthonormal"),
        (LowRank(EYE, -torch.ones(3)), "negative"),
        (LowRank(EYE, torch.tensor([1.0, math.nan, 1.0])), "negative"),
        (LowRank(EYE, torch.ones(3), rest=-1.0), "negative"),
        (LowRank(EYE, torch.ones(3), rest=math.nan), "negative"),
    ],
)
def test_bad_covariances_are_refused(cov, match):
    with pytest.raises(FanalError, match=match):
        Gaussian(torch.zeros(3), cov)
    with pytest.raises(FanalError, match=match):
        Mixture(torch.zeros(1, 3), cov=[cov])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"means": torch.zeros(3)}, "means"),
        ({"means": torch.zeros(0, 3)}, "means"),
        ({"means": torch.full((2, 3), math.nan)}, "means"),
        ({"weights": [1.0]}, "weights"),
        ({"weights": [1.0, 0.0]}, "weights"),
        ({"weights": [1.0, math.nan]}, "weights"),
        ({"weights": [1.0, math.inf]}, "weights"),
        ({"std": None}, "either"),
        ({"cov": [1.0, 1.0]}, "either"),
        ({"std": -1.0}, "std"),
        ({"std": math.nan}, "std"),
        ({"std": torch.ones(3)}, "std"),
        ({"std": None, "cov": [1.0]}, "one covariance"),
    ],
)
def test_bad_mixtures_are_refused(kwargs, match):
    good = {"means": torch.zeros(2, 3), "weights": [1.0, 1.0], "std": 0.1}
    Mixture(**good)
    with pytest.raises(FanalError, match=match):
        Mixture(**{**good, **kwargs})


def test_bad_calls_are_refused():
    for D in (gaussian(), Mixture(torch.zeros(2, 3), std=0.1)):
        for name in ("__call__", "score", "log_density"):
            with pytest.raises(FanalError, match="expected a batch"):
                getattr(D, name)(torch.zeros(2, 4), level(1.0))
            with pytest.raises(FanalError, match="sigma"):
                getattr(D, name)(torch.zeros(2, 3), torch.ones(3))
            with pytest.raises(FanalError, match="sigma"):
                getattr(D, name)(torch.zeros(2, 3), torch.ones(2, 1))
    with pytest.raises(FanalError, match="mean"):
        Gaussian(torch.tensor(1.0), 1.0)
    with pytest.raises(FanalError, match="mean"):
        Gaussian(torch.tensor([math.inf]), 1.0)
