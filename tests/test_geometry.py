"""Geometry against curves and laws whose shape is known: helices, Gaussians, planes."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fanal
from fanal import geometry
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.exact.covariance import LowRank
from fanal.geometry import Band


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(dim, seed=3):
    return torch.linalg.qr(normal(dim, dim, seed=seed)).Q


def helix(count=200, radius=2.0, pitch=0.5, turns=1.5):
    """A helix (1, N, 3): curvature r/(r² + p²), torsion p/(r² + p²) everywhere."""
    t = torch.linspace(0, 2 * math.pi * turns, count, dtype=torch.float64)
    return torch.stack([radius * t.cos(), radius * t.sin(), pitch * t], 1)[None]


def run(D, x, steps, solver):
    sigmas = fanal.schedules.polynomial(steps, zero=False)
    return fanal.Trajectory.record(fanal.trace(D, x, sigmas, solver))


@pytest.fixture(scope="module")
def law():
    return Gaussian(normal(12, seed=1), torch.linspace(0.01, 4, 12, dtype=torch.float64) ** 2)


def test_a_plane_is_a_plane():
    """Half a circle in 30 dimensions: deviation is its height, one component off the chord explains everything."""
    t = torch.linspace(0, math.pi, 181, dtype=torch.float64)
    plane = torch.zeros(181, 30, dtype=torch.float64)
    plane[:, 0], plane[:, 1] = -3 * t.cos(), 3 * t.sin()
    path = (plane @ rotation(30) + 7)[:, None]
    assert torch.allclose(geometry.deviation(path)[:, 0], plane[:, 1].abs(), atol=1e-9)
    assert float(geometry.length(path)[-1]) == pytest.approx(3 * math.pi, rel=1e-4)
    assert torch.allclose(geometry.distance(path)[:, 0], (plane - plane[-1]).norm(dim=1), atol=1e-9)
    assert torch.allclose(geometry.rotation(path), torch.tensor(math.pi / 180, dtype=torch.float64), atol=1e-9)
    found = geometry.project(path, 3)
    assert torch.allclose(found.explained[0], torch.tensor([1.0, 0, 0], dtype=torch.float64), atol=1e-9)
    assert float(found.error[1].max()) < 1e-6
    assert torch.allclose(found.error[0], geometry.deviation(path))
    assert torch.allclose(found.coordinates[0, :, 0], plane[:, 0] + 3, atol=1e-9)
    shares = torch.cov(plane[:, :2].T).diag()
    assert torch.allclose(geometry.direct(path, 2)[0], (shares / shares.sum()).sort(descending=True).values, atol=1e-9)


def test_projections_are_those_of_plain_linear_algebra():
    path = normal(9, 3, 5, 4, seed=2).cumsum(0)
    found = geometry.project(path, 4)
    for b in range(3):
        rows = path[:, b].flatten(1) - path[0, b].flatten()
        unit = rows[-1] / rows[-1].norm()
        rest = rows - (rows @ unit)[:, None] * unit
        u, s, vh = torch.linalg.svd(rest - rest.mean(0), full_matrices=False)
        assert torch.allclose(found.explained[b], (s**2 / (s**2).sum())[:4], atol=1e-10)
        assert torch.allclose(found.coordinates[b, :, 1:].abs(), (u * s)[:, :4].abs(), atol=1e-8)
        for k in range(1, 5):
            back = rest.mean(0) + (u[:, :k] * s[:k]) @ vh[:k]
            assert torch.allclose(found.error[k, :, b], (rest - back).norm(dim=1), atol=1e-6)


@given(st.integers(0, 10**6), st.floats(-50, 50), st.floats(0.1, 20))
def test_shape_does_not_know_where_it_is(seed, shift, scale):
    """Turned, moved and scaled, a path has the same angles and shares, and scaled distances."""
    path = normal(6, 2, 8, seed=seed).cumsum(0)
    other = scale * path @ rotation(8, seed + 1) + shift
    assert torch.allclose(geometry.deviation(other), scale * geometry.deviation(path), rtol=1e-7, atol=1e-9 * scale)
    assert torch.allclose(geometry.rotation(other), geometry.rotation(path), atol=1e-7)
    assert torch.allclose(geometry.project(other, 3).explained, geometry.project(path, 3).explained, atol=1e-7)


def test_angles_keep_their_digits():
    """Two nearly equal directions, where a cosine in float64 would say 0."""
    path = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 1e-9]], dtype=torch.float64)[:, None]
    assert float(geometry.rotation(path)) == pytest.approx(1e-9, rel=1e-6)


def test_an_euler_run_points_at_its_predictions(law):
    x = 80 * normal(5, 12, seed=3)
    found = run(law, x, 12, fanal.solvers.Euler())
    d = geometry.pendulum(found.x, found.denoised)
    assert torch.allclose(d, (found.denoised - found.x[:-1]).flatten(2).norm(dim=2))
    cosine = geometry.angle(found.x, found.denoised)
    assert cosine.shape == (12, 5)
    assert float(cosine[-1].min()) == pytest.approx(1, abs=1e-12)  # the last step goes straight
    straight = fanal.Trajectory.record(fanal.trace(law, x, torch.tensor([80.0, 0.0]), fanal.solvers.Euler()))
    assert torch.allclose(geometry.angle(straight.x, straight.denoised), torch.ones(1, 5, dtype=torch.float64))


def test_an_euler_step_shortens_the_pendulum_as_sigma_falls(law):
    """[REG] sec. 4.2.1: `‖D_n − x_{n+1}‖ = (sigma'/sigma)·‖D_n − x_n‖`; what the next one differs by is its swing."""
    sigmas = fanal.schedules.polynomial(15)
    found = fanal.Trajectory.record(fanal.trace(law, 80 * normal(5, 12, seed=8), sigmas, fanal.solvers.Euler()))
    before = geometry.pendulum(found.x, found.denoised)
    after = geometry.pendulum(torch.cat([found.x[1:], found.x[-1:]]), found.denoised)
    ratio = (sigmas[1:] / sigmas[:-1])[:, None]
    assert torch.allclose(after, ratio * before, rtol=1e-9, atol=1e-9)
    assert float(after[-1].max()) < 1e-9  # the step to 0 goes to the prediction
    swing = (found.denoised[1:] - found.denoised[:-1]).norm(dim=2)
    off = (before[1:] - after[:-1]).abs()
    assert bool((off <= swing + 1e-9).all())
    assert float(off.max()) > 1  # which is no rounding


@pytest.mark.parametrize(("solver", "order"), [(fanal.solvers.Euler(), 1), (fanal.solvers.Heun(), 2)])
def test_deviation_converges_to_the_closed_form(law, solver, order):
    """[REG] eq. 23: at the solver's order."""
    x = law.mean + 80 * normal(4, 12, seed=4)
    errors = []
    for steps in (40, 80):
        found = run(law, x, steps, solver)
        truth = geometry.deviation(geometry.exact_path(law, x, found.sigmas))
        errors.append(float((geometry.deviation(found.x) - truth).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_the_expected_residual_is_that_of_random_starts():
    """Mean squares of 4,000 exact runs, to 5 errors; a covariance with a rest is the full one it stands for."""
    basis, values = torch.linalg.qr(normal(40, 3, seed=3))[0], torch.tensor([9.0, 2.0, 0.5], dtype=torch.float64)
    mean, rest = normal(40, seed=4), 0.04
    short = Gaussian(mean, LowRank(basis, values, rest))
    full = Gaussian(mean, basis @ torch.diag(values - rest) @ basis.T + rest * torch.eye(40, dtype=torch.float64))
    sigmas = torch.tensor([8.0, 5.0, 2.0, 0.7, 0.1, 0.0], dtype=torch.float64)
    found = geometry.expected_residual(short, sigmas, 8.0)
    for one, other in zip(found, geometry.expected_residual(full, sigmas, 8.0), strict=True):
        assert torch.allclose(one, other, atol=1e-9)
    path = geometry.exact_path(full, 8 * normal(4000, 40, seed=5), sigmas)
    line = path[-1] + (sigmas / 8)[:, None, None] * (path[0] - path[-1])
    squares = (path - line).square().sum(2)[1:-1]
    error = squares.std(1) / math.sqrt(4000)
    assert bool(((squares.mean(1) - found[0][1:-1].square()).abs() < 5 * error).all())
    assert bool((error < 0.02 * squares.mean(1)).all())
    across = geometry.deviation(path).square().mean(1)[1:-1].sqrt()  # of ratios, not of means: about the same
    assert torch.allclose(across, found[1][1:-1], rtol=0.05)
    assert bool((across < 0.95 * found[0][1:-1]).any())


def test_the_residual_is_the_way_off_the_straight_schedule(law):
    """`x_t − x_0 − (sigma/sigma_T)(x_T − x_0) = Σ φ_k ⟨u_k, x_T − μ⟩ u_k`."""
    sigmas = torch.cat([fanal.schedules.polynomial(30, zero=False), torch.zeros(1, dtype=torch.float64)])
    x = law.mean + 80 * normal(3, 12, seed=5)
    path = geometry.exact_path(law, x, sigmas)
    line = path[-1] + (sigmas / sigmas[0])[:, None, None] * (path[0] - path[-1])
    phi = geometry.residual(law.cov.values, sigmas, 80.0)
    assert torch.allclose(path - line, phi[:, None] * (x - law.mean), atol=1e-9)


@given(st.floats(1e-4, 1e4))
def test_each_residual_has_one_maximum(value):
    """[REG] prop. 4, component by component."""
    sigmas = torch.linspace(0, 80, 2000, dtype=torch.float64)
    phi = geometry.residual(torch.tensor([value]), sigmas, 80.0)[:, 0]
    assert float(phi.max()) <= 1e-12
    falling = phi.diff() < -1e-12
    assert int((falling[1:] & ~falling[:-1]).sum()) == 0  # once it rises it never falls again


def test_the_expected_deviation_can_have_two_maxima():
    """What proposition 4 of [REG] does not say: one eigenvalue of 6,400, and a million of 1e-4."""
    sigmas = torch.logspace(-3, math.log10(80), 4000, dtype=torch.float64)
    values, counts = torch.tensor([6400.0, 1e-4]), torch.tensor([1.0, 1e6], dtype=torch.float64)
    variance = values.double() + 6400
    total = (geometry.residual(values, sigmas, 80.0) ** 2 * counts * variance).sum(1)
    turns = total.diff().sign().diff()
    assert int((turns < 0).sum()) == 2


def test_a_helix_has_its_curvature_and_torsion():
    found = geometry.frenet(helix(), window=3)
    k, t = 2 / (4 + 0.25), 0.5 / (4 + 0.25)
    assert torch.allclose(found.curvature, torch.full_like(found.curvature, k), rtol=1e-2)
    assert torch.allclose(found.torsion[:, 10:-10], torch.full((1, 180), t, dtype=torch.float64), rtol=1e-2)
    mirrored = geometry.frenet(helix() * torch.tensor([1.0, 1.0, -1.0]), window=3)
    assert torch.allclose(mirrored.torsion, -found.torsion, atol=1e-9)
    errors = [float((geometry.frenet(helix(n), 3).curvature - k)[:, 5:-5].abs().max()) for n in (50, 100, 200)]
    assert [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)] == pytest.approx([2, 2], abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "window"), [(20, 5), (20, 2), (301, 50)])
def test_a_straight_line_has_no_torsion(count, window, dtype):
    """In any direction: NaN everywhere, not the torsion of its rounding; a helix above that has its own."""
    t = torch.linspace(0, 1, count, dtype=torch.float64)[None, :, None]
    for way in ([1.0, 2, 3], [0.1, 0.7, -0.3], [1, 0, 0]):
        found = geometry.frenet((t * torch.tensor(way)).to(dtype), window)
        assert bool(found.torsion.isnan().all())
        assert float(found.curvature.max()) < (1e-2 if dtype is torch.float32 else 1e-9)
    low = 1e-2 if dtype is torch.float32 else 1e-8
    found = geometry.frenet(helix(200, radius=low, pitch=1.0).to(dtype), 5)
    assert not bool(found.torsion.isnan().any())
    assert torch.allclose(found.torsion[:, 10:-10], torch.ones(1, 180, dtype=torch.float64), rtol=0.05)


def test_curvature_and_torsion_determine_the_curve():
    """The fundamental theorem of curves: rebuilt, the helix is itself up to a shift and a rotation, no mirror."""
    curve = helix(400)
    found = geometry.frenet(curve, window=3)
    length, k, t = found.length[0], torch.full((400,), 2 / 4.25), torch.full((400,), 0.5 / 4.25)
    exact = geometry.rebuild(length * (4.25**0.5 * 3 * math.pi / length[-1]), k, t)
    own = (curve[0] - curve[0].mean(0))[None]
    _, left = geometry.procrustes(own, exact - exact.mean(0), fixed=0, mirrors=False)
    assert float(left) < 1e-6
    rough = geometry.rebuild(found.length[0], found.curvature[0], found.torsion[0])
    _, left = geometry.procrustes(own, rough - rough.mean(0), fixed=0, mirrors=False)
    assert float(left) / math.sqrt(400) < 0.05
    wrong = geometry.rebuild(found.length[0], found.curvature[0], -found.torsion[0])
    _, left = geometry.procrustes(own, wrong - wrong.mean(0), fixed=0, mirrors=False)
    assert float(left) / math.sqrt(400) > 0.5
    _, left = geometry.procrustes(own, wrong - wrong.mean(0), fixed=0)  # its mirror image
    assert float(left) / math.sqrt(400) < 0.05


def test_without_mirrors_curves_are_turned_as_scipy_turns_them():
    from scipy.spatial.transform import Rotation

    base = normal(15, 3, seed=6).cumsum(0)
    signs = torch.tensor([[1.0, 1.0, (-1.0) ** s] for s in range(6)], dtype=torch.float64)  # every second one mirrored
    curves = torch.stack([base * signs[s] @ rotation(3, s) + 0.1 * normal(15, 3, seed=20 + s) for s in range(6)])
    turned, left = geometry.procrustes(curves, base, fixed=0, mirrors=False)
    for own, out, off in zip(curves, turned, left, strict=True):
        best, rest = Rotation.align_vectors(base.numpy(), own.numpy())[:2]
        assert torch.allclose(out, torch.from_numpy(best.apply(own.numpy())), atol=1e-9)
        assert float(off) == pytest.approx(float(rest), rel=1e-9)
    _, free = geometry.procrustes(curves, base, fixed=0)
    assert (left > 2 * free).tolist() == [False, True] * 3


def test_alignment_undoes_turns_and_mirrors():
    base = normal(15, 3, seed=6).cumsum(0)
    turns = [torch.block_diag(torch.ones(1, 1, dtype=torch.float64), rotation(2, s)) for s in range(6)]
    curves = torch.stack([base @ turn for turn in turns])
    assert any(float(torch.linalg.det(turn)) < 0 for turn in turns)
    turned, left = geometry.procrustes(curves, base)
    assert torch.allclose(turned, base.expand(6, -1, -1), atol=1e-10)
    assert float(left.max()) < 1e-10
    aligned, mean, left = geometry.align(curves + 0.01 * normal(6, 15, 3, seed=7))
    assert float(left.max()) < 0.2
    assert torch.allclose(aligned.mean(0), mean, atol=1e-6)
    full, left = geometry.procrustes((base @ rotation(3, 8))[None], base, fixed=0)
    assert torch.allclose(full[0], base, atol=1e-10)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 99))
def test_streams_equal_the_whole_for_any_split(sizes, seed):
    values = 1e3 + normal(4, sum(sizes), seed=seed)
    whole, gathered = Band.of(values), functools.reduce(Band.merge, map(Band.of, values.split(sizes, 1)))
    for name in ("mean", "squares", "low", "high", "std", "se"):
        assert torch.allclose(getattr(gathered, name), getattr(whole, name), rtol=1e-9, atol=1e-12)
    assert gathered.count == sum(sizes)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: geometry.deviation(torch.zeros(3, 2)), "shape"),
        (lambda: geometry.deviation(torch.zeros(3, 2, 4)), "no chord"),
        (lambda: geometry.deviation(torch.full((3, 2, 4), math.inf)), "finite"),
        (lambda: geometry.project(normal(4, 1, 3), 4), r"\[1, 3\]"),
        (lambda: geometry.rotation(normal(2, 1, 3)), ">= 3 states"),
        (lambda: geometry.angle(normal(4, 1, 3), normal(4, 1, 3)), "3 predictions"),
        (lambda: geometry.frenet(normal(1, 9, 3), 5), r"\[2, 4\]"),
        (lambda: geometry.frenet(normal(1, 9, 2)), r"\(B, N, 3\)"),
        (lambda: geometry.frenet(torch.zeros(1, 9, 3), 2), "equal"),
        (lambda: geometry.rebuild(torch.zeros(3), torch.zeros(3), torch.zeros(3)), "increase"),
        (lambda: geometry.procrustes(normal(1, 9, 3), normal(8, 3)), "reference"),
        (lambda: geometry.procrustes(normal(1, 9, 3), normal(9, 3), fixed=3), "fixed"),
        (lambda: geometry.residual(torch.ones(1), torch.tensor([90.0]), 80.0), "sigma_max"),
        (lambda: Band.of(torch.zeros(3, 2)).merge(Band.of(torch.zeros(4, 2))), "3 and 4 states"),
    ],
)
def test_bad_input_is_told(ask, said):
    with pytest.raises(FanalError, match=said):
        ask()
