"""Linear processes: conversions, moments, the equivalence of [REG] lemma 4, and its corollaries 4 and 5."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

import fanal
from fanal.errors import FanalError
from fanal.exact import Gaussian, Mixture
from fanal.schedules import logsnr, polynomial
from fanal.sde import PROCESSES, LinearProcess, cosine, flow, linear_process, quadratic, ve, vp
from fanal.sde.integrals import antiderivative, slope_in_time

F64 = torch.float64
NAMES = list(PROCESSES)


def times(process, count=101):
    return torch.linspace(process.t_min, process.t_max, count, dtype=F64)


def close(got, expected, rtol=1e-8, atol=1e-12):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def rebuilt(process, pair):
    """The same process from two of its functions."""
    ends = {"t_min": process.t_min, "t_max": process.t_max}
    if pair == "slopes":
        starts = {"s_min": float(process.s(process.t_min)), "sigma_min": process.sigma_min}
        return linear_process(f=process.f, g=process.g, **ends, **starts)
    return linear_process(s=process.s, sigma=process.sigma, **ends)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pair", ["slopes", "scales"])
def test_named_processes_agree_with_both_conversions(name, pair):
    process = PROCESSES[name]()
    other, t = rebuilt(process, pair), times(process)
    for function in ("s", "sigma", "f", "g"):
        close(getattr(other, function)(t), getattr(process, function)(t))
    again = rebuilt(other, "slopes" if pair == "scales" else "scales")
    for function in ("s", "sigma", "f", "g"):
        close(getattr(again, function)(t), getattr(process, function)(t))
    close(other.t_of_sigma(process.sigma(t)), t, atol=1e-10)
    close(process.t_of_sigma(process.sigma(t)), t, atol=1e-10)


WAVES = st.lists(st.floats(-0.5, 0.5), min_size=3, max_size=3)


@settings(max_examples=25)
@given(WAVES, WAVES, st.floats(0.2, 3.0), st.floats(0.0, 0.5), st.floats(0.3, 2.0))
def test_conversions_are_inverse_for_smooth_processes(scales, waves, speed, start, length):
    """s = exp of a trigonometric sum; sigma² grows at the rate of such an exponential, so it is increasing."""

    def wave(weights, t):
        return sum(w * (k * t).sin() for k, w in enumerate(weights, 1))

    ends = {"t_min": start, "t_max": start + length}
    rate = antiderivative(lambda t: speed * (2 * wave(waves, t)).exp(), *ends.values())
    process = linear_process(s=lambda t: wave(scales, t).exp(), sigma=lambda t: (0.01 + rate(t)).sqrt(), **ends)
    back, t = rebuilt(process, "slopes"), times(process, 33)
    close(back.s(t), process.s(t))
    close(back.sigma(t), process.sigma(t))
    close(process.g(t), process.s(t) * (speed * (2 * wave(waves, t)).exp()).sqrt())
    forth = rebuilt(back, "scales")
    close(forth.f(t), process.f(t), atol=1e-9)
    close(forth.g(t), process.g(t))
    close(process.t_of_sigma(process.sigma(t)), t, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_mean_and_variance_solve_the_equations_of_the_sde(name):
    """dm/dt = f·m and dV/dt = 2·f·V + g², solved by another program, give s and s²·sigma²."""
    process = PROCESSES[name]()
    first, last = process.t_min, process.t_min + 0.9 * (process.t_max - process.t_min)

    def moved(t, y):
        f, g = float(process.f(t)), float(process.g(t))
        return [f * y[0], 2 * f * y[1] + g**2]

    found = integrate.solve_ivp(moved, (first, last), [1.0, 0.0], method="DOP853", rtol=1e-11, atol=1e-14)
    s, sigma = float(process.s(last)), float(process.sigma(last))
    np.testing.assert_allclose(found.y[:, -1], [s, (s * sigma) ** 2], rtol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_perturbed_data_have_the_stated_moments(name):
    """With 20,000 samples a mean is off by 4.5 standard errors once in 150,000 times, a variance about as rarely."""
    process, count = PROCESSES[name](), 20_000
    t = process.t_of_sigma(2.0)
    x0 = torch.tensor([1.5, -0.5], dtype=F64)
    z = process.perturb(x0.expand(count, 2), t, fanal.noise((2,), range(count), dtype=F64))
    mean, std = process.s(t) * x0, float(process.s(t) * process.sigma(t))
    assert bool(((z.mean(0) - mean).abs() < 4.5 * std / math.sqrt(count)).all())
    assert bool(((z.var(0) - std**2).abs() < 4.5 * std**2 * math.sqrt(2 / count)).all())
    close(process.to_x(z, t), x0 + 2.0 * fanal.noise((2,), range(count), dtype=F64))
    close(process.from_x(process.to_x(z, t), t), z)


@pytest.mark.parametrize("name", NAMES)
def test_transitions_compose(name):
    """Chapman–Kolmogorov, and the first transition from clean data is the perturbation itself."""
    process = PROCESSES[name]()
    a, b, c = (process.t_min + share * (process.t_max - process.t_min) for share in (0.2, 0.5, 0.7))
    (scale1, std1), (scale2, std2), (scale, std) = process.kernel(a, b), process.kernel(b, c), process.kernel(a, c)
    close(scale1 * scale2, scale)
    close((scale2 * std1) ** 2 + std2**2, std**2)
    scale, std = process.kernel(process.t_min, c)
    close(scale, process.s(c) / process.s(process.t_min))
    close(std, process.s(c) * process.sigma(c))
    assert float(process.kernel(b, b)[1]) == 0
    with pytest.raises(FanalError, match="forward in time"):
        process.kernel(c, a)


@pytest.mark.parametrize("name", NAMES)
def test_one_time_per_sample_and_other_dtypes(name):
    process = PROCESSES[name]()
    t = process.t_of_sigma(torch.tensor([0.1, 1.0, 5.0]))
    x0, noise = (fanal.noise((2, 3), seeds) for seeds in (range(3), range(3, 6)))
    together = process.perturb(x0, t, noise)
    assert together.dtype == torch.float32
    for i in range(3):
        assert torch.equal(process.perturb(x0[i : i + 1], t[i], noise[i : i + 1])[0], together[i])
    assert process.s(t).dtype == F64


def test_named_instances_are_the_textbook_ones():
    t = torch.tensor([0.0, 0.25, 0.9], dtype=F64)
    close(vp().s(t) ** 2, torch.exp(-(0.1 * t + 0.5 * 19.9 * t**2)))
    for process in (vp(), quadratic(), cosine()):
        close(process.s(t) ** 2 * (1 + process.sigma(t) ** 2), torch.ones(3, dtype=F64), rtol=1e-12)
        close(process.g(t) ** 2, -2 * process.f(t), rtol=1e-12)
    phi = (t + 0.008) / 1.008 * math.pi / 2
    close(cosine().s(t), phi.cos() / phi.cos()[0], rtol=1e-12)
    close(
        flow().perturb(torch.ones(1, 1, dtype=F64), 0.25, torch.zeros(1, 1, dtype=F64)),
        torch.full((1, 1), 0.75, dtype=F64),
    )
    close(flow().s(t) * flow().sigma(t), t, rtol=1e-12)
    close(ve().sigma(t), t)
    table = (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * np.arange(100_000) / 99_999) ** 2  # a finer latent diffusion
    alpha = math.exp(-1000 * table.mean())
    assert float(quadratic().s(1.0)) ** 2 == pytest.approx(alpha, rel=1e-4)


MEANS, MIX = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]], dtype=F64), 0.3


def mixture():
    return Mixture(MEANS, std=MIX)


def answers(process, prediction, law):
    """What the ideal network of a kind answers in z-space, from the law of the data alone."""

    def network(z, t):
        s, sigma, f, g = (function(t)[:, None] for function in (process.s, process.sigma, process.f, process.g))
        x = z / s
        denoised = law(x, sigma[:, 0])
        noise = (x - denoised) / sigma
        return {
            "sample": denoised,
            "epsilon": noise,
            "score": -noise / (s * sigma),
            "velocity": f * z + g**2 / 2 * noise / (s * sigma),  # f·z − g²/2·score
            "v_prediction": s * noise - s * sigma * denoised,
            "flow_prediction": noise - denoised,
        }[prediction]

    return network


CASES = [(name, kind) for name in NAMES for kind in ("sample", "epsilon", "score", "velocity")]
CASES += [("vp", "v_prediction"), ("cosine", "v_prediction"), ("flow", "flow_prediction")]


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_an_ideal_network_in_z_space_is_the_ideal_denoiser(name, prediction):
    process, law = PROCESSES[name](), mixture()
    D = process.denoiser(answers(process, prediction, law), prediction, (2,))
    assert D.sigma_max == process.sigma_max
    assert isinstance(D, fanal.Model)
    for sigma in (0.05, 0.7, 10.0):
        x = fanal.noise((2,), range(4), 1.0, dtype=F64) * math.sqrt(4 + sigma**2)
        close(D(x, torch.tensor(sigma, dtype=F64)), law(x, torch.tensor(sigma, dtype=F64)), rtol=1e-9, atol=1e-9)
    sigmas = torch.tensor([0.1, 1.0, 5.0, 2.0], dtype=F64)
    close(D(x, sigmas), law(x, sigmas), rtol=1e-9, atol=1e-9)
    assert D(x.float(), torch.tensor(0.7, dtype=F64)).dtype == torch.float32


def test_velocity_and_flow_prediction_are_one_for_flow_matching():
    process = flow()
    z, t = fanal.noise((2,), range(5), dtype=F64), torch.full((5,), 0.6, dtype=F64)
    one, other = (answers(process, kind, mixture())(z, t) for kind in ("velocity", "flow_prediction"))
    close(one, other)


def test_a_prediction_that_does_not_belong_to_the_process_is_refused():
    for name, prediction in (("flow", "v_prediction"), ("ve", "v_prediction"), ("vp", "flow_prediction")):
        with pytest.raises(FanalError, match="which this one is not"):
            PROCESSES[name]().denoiser(lambda z, t: z, prediction, (2,))
    with pytest.raises(FanalError, match="did you mean 'epsilon'"):
        vp().denoiser(lambda z, t: z, "epsilom", (2,))


@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_depend_on_the_process(name):
    """[GEO] prop. 7: the same noise, grid and solver give the same samples, whatever z-space the network lives in."""
    process, law = PROCESSES[name](), mixture()
    D = process.denoiser(answers(process, "epsilon", law), "epsilon", (2,))
    x, sigmas = fanal.noise((2,), range(6), 10.0, dtype=F64), polynomial(12, 0.01, 10.0)
    expected = fanal.sample(law, x, sigmas, fanal.solvers.Heun())
    close(fanal.sample(D, x, sigmas, fanal.solvers.Heun()), expected, rtol=1e-9, atol=1e-9)


# [REG] corollaries 4 and 5. The loops below solve in z-space; the library never does.


def noise_prediction(process, law, z, t):
    sigma = process.sigma(t)
    x = process.to_x(z, t)
    return (x - law(x, sigma)) / sigma


def solve_29(process, law, z, grid, heun):
    """Eq. 29: `z' = s'/s·z + s'·∫ eps dsigma`, with the integral by a rectangle (Euler) or a trapezoid (Heun)."""
    for t, t_next in pairwise(grid):
        ratio, s_next = process.s(t_next) / process.s(t), process.s(t_next)
        step = process.sigma(t_next) - process.sigma(t)
        first = noise_prediction(process, law, z, t)
        moved = ratio * z + s_next * step * first
        if heun:
            second = noise_prediction(process, law, moved, t_next)
            moved = ratio * z + s_next * step * (first + second) / 2
        z = moved
    return z


def solve_28(process, law, z, grid, heun):
    """Eq. 28: `z' = z + ∫ (f·z + s·sigma'·eps) dt`, by the same two rules."""

    def speed(z, t):
        rate = process.g(t) ** 2 / (2 * process.s(t) * process.sigma(t))  # s·dsigma/dt
        return process.f(t) * z + rate * noise_prediction(process, law, z, t)

    for t, t_next in pairwise(grid):
        first = speed(z, t)
        moved = z + (t_next - t) * first
        z = z + (t_next - t) * (first + speed(moved, t_next)) / 2 if heun else moved
    return z


def in_both_spaces(process, steps, heun, solve):
    """The largest difference between solving in z-space and in x-space with the same steps, relative to x."""
    law, sigmas = mixture(), logsnr(steps, 0.05, 8.0, zero=False)
    x = fanal.noise((2,), range(8), 8.0, dtype=F64)
    expected = fanal.sample(law, x, sigmas, fanal.solvers.Heun() if heun else fanal.solvers.Euler())
    grid = process.t_of_sigma(sigmas)
    z = solve(process, law, process.from_x(x, grid[0]), grid, heun)
    return float((process.to_x(z, grid[-1]) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_corollary_5_solving_eq_29_in_z_space_is_solving_in_x_space(name, heun):
    assert in_both_spaces(PROCESSES[name](), 20, heun, solve_29) < 1e-10


@pytest.mark.parametrize("name", ["vp", "cosine", "quadratic"])
def test_corollary_4_solving_eq_28_in_z_space_is_not(name):
    """The difference is percents at 20 steps, and halves when the step does: it is an error of the first order."""
    gaps = [in_both_spaces(PROCESSES[name](), steps, False, solve_28) for steps in (20, 160, 320, 640)]
    assert gaps[0] > 0.03
    orders = [math.log2(a / b) for a, b in pairwise(gaps[1:])]
    assert all(0.9 < order < 1.1 for order in orders), (gaps, orders)


@pytest.mark.parametrize("name", ["vp", "flow"])
def test_corollary_4_with_heun_the_difference_is_of_second_order(name):
    gaps = [in_both_spaces(PROCESSES[name](), steps, True, solve_28) for steps in (20, 160, 320)]
    assert gaps[0] > 0.003
    assert 1.8 < math.log2(gaps[1] / gaps[2]) < 2.2, gaps


def test_euler_on_a_straight_line_is_euler_in_x_space():
    """The exception to corollary 4: where s and s·sigma are linear in t, an Euler step is the same in both spaces."""
    assert in_both_spaces(flow(), 20, False, solve_28) < 1e-12


def test_without_scale_both_equations_are_one():
    """With s = 1 and sigma = t, eqs. 28 and 29 are the same equation."""
    assert in_both_spaces(ve(), 20, False, solve_28) < 1e-12


BAD = {
    "s(t) must be positive": {"s": lambda t: 0.5 - t, "sigma": lambda t: t},
    "sigma(t) must be at least 0 and increasing": {"s": torch.ones_like, "sigma": lambda t: (t - 0.3) ** 2},
    "sigma(t) must be": {"s": torch.ones_like, "sigma": lambda t: t - 1},
    "g(t) must be": {"f": torch.zeros_like, "g": lambda t: t - 0.5},
    "not finite": {"f": lambda t: 1 / (t - t), "g": torch.ones_like},
    "too fast": {"f": lambda t: (1e9 * t).sin() * 1e9, "g": torch.ones_like},
    "give s and sigma, or f and g, got s and g": {"s": torch.ones_like, "g": torch.ones_like},
    "got nothing": {},
    "got s and sigma and f and g": dict.fromkeys(("s", "sigma", "f", "g"), torch.ones_like),
    "t_min < t_max": {"s": torch.ones_like, "sigma": lambda t: t, "t_max": 0.0},
    "go with f and g": {"s": torch.ones_like, "sigma": lambda t: t, "s_min": 1.0},
    "must be positive and": {"f": torch.zeros_like, "g": torch.ones_like, "s_min": 0.0},
    "the shape of t": {"s": lambda t: torch.ones(3), "sigma": lambda t: t},
}


@pytest.mark.parametrize("said", BAD)
def test_what_is_no_process_is_refused(said):
    with pytest.raises(FanalError) as error:
        linear_process(**BAD[said])
    assert said in str(error.value)


def test_times_and_levels_outside_are_refused():
    process = flow(0.9)
    for t in (-0.1, 0.95, float("nan")):
        with pytest.raises(FanalError, match="runs from t = 0 to 0.9"):
            process.s(t)
    with pytest.raises(FanalError, match="noise levels from 0 to 9"):
        process.t_of_sigma(9.5)
    for make, words in (
        (vp, (2.0, 1.0)),
        (quadratic, (0.0, 1.0)),
        (cosine, (1.0,)),
        (flow, (1.0,)),
        (cosine, (0.0, 1.5)),
    ):
        with pytest.raises(FanalError, match="need"):
            make(*words)


def test_constants_and_numbers_are_taken():
    process = linear_process(f=lambda t: torch.tensor(0.0), g=lambda t: torch.tensor(2.0), t_max=3.0)
    assert isinstance(process, LinearProcess)
    assert float(process.sigma(3)) == pytest.approx(math.sqrt(12), rel=1e-12)
    assert process.s(torch.tensor([1, 2])).tolist() == [1.0, 1.0]
    assert float(process.f(1.0)) == 0
    kept = linear_process(s=lambda t: torch.tensor(2.0), sigma=lambda t: t.sqrt(), t_max=4.0)
    assert [float(kept.f(0.0)), float(kept.g(0.0)), float(kept.g(2.0))] == pytest.approx([0, 2, 2])


def test_integrals_and_slopes():
    t = torch.linspace(0, 2, 41, dtype=F64)
    close(antiderivative(torch.cos, 0.0, 2.0)(t), t.sin(), rtol=1e-12, atol=1e-14)
    close(
        antiderivative(lambda u: 1 / (2.001 - u), 0.0, 2.0)(t), -((2.001 - t) / 2.001).log(), rtol=1e-11
    )  # near a pole
    close(
        antiderivative(lambda u: (u - 0.7).abs(), 0.0, 2.0)(t), ((t - 0.7) * (t - 0.7).abs() + 0.49) / 2, rtol=1e-9
    )  # a kink
    close(antiderivative(lambda u: u.clamp_min(1e-300) ** -0.5, 0.0, 2.0)(t), 2 * t.sqrt(), rtol=0, atol=1e-8)  # a pole
    whole = antiderivative(torch.cos, 0.0, 2.0)
    close(slope_in_time(whole, t), t.cos(), rtol=1e-10)
    twice = t.clone().requires_grad_()
    (second,) = torch.autograd.grad(slope_in_time(torch.sin, twice).sum(), twice)
    close(second, -t.sin())
    with torch.inference_mode():
        close(slope_in_time(torch.sin, t), t.cos())


def test_a_gaussian_stays_gaussian():
    """Data N(m, v) become N(s·m, s²·(v + sigma²)): the score of that law, in z-space, gives the closed form's D."""
    process = cosine()
    law = Gaussian(torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([0.5, 2.0], dtype=F64))

    def score(z, t):
        s, sigma = process.s(t)[:, None], process.sigma(t)[:, None]
        return (s * law.mean - z) / (s**2 * (torch.tensor([0.5, 2.0], dtype=F64) + sigma**2))

    D, x, sigma = process.denoiser(score, "score", (2,)), fanal.noise((2,), range(5), 3.0, dtype=F64), torch.tensor(1.7)
    close(D(x, sigma), law(x, sigma))
