"""What networks predict: every conversion against the closed form of a Gaussian, up to infinite sigma."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fanal.adapters.predictions import PREDICTIONS, PROCESSES, Timesteps, denoised_of, input_of, output_of
from fanal.denoiser import Counted, expand
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.sampling import sample, trace
from fanal.schedules import check_sigmas, polynomial
from fanal.seeding import noise
from fanal.solvers import Euler, Heun

F64 = torch.float64
MEAN, VARIANCE = torch.tensor([0.7, -1.2, 0.4], dtype=F64), 0.3


def gaussian():
    return Gaussian(MEAN, torch.full((3,), VARIANCE, dtype=F64))


def truth(z, sigma, prediction):
    """What the ideal network of a kind answers for N(MEAN, VARIANCE), from the joint law of (x0, noise, z).

    z = a·x0 + b·n with (a, b) of the process; each target is linear in (x0, n), so its mean given z is a regression.
    """
    if prediction == "flow_prediction":
        a, b = 1 / (1 + sigma), sigma / (1 + sigma)
        target = (-1.0, 1.0)  # n − x0
    elif prediction == "score":
        a, b, target = torch.ones((), dtype=F64), sigma, (0.0, -1 / sigma)  # −n/sigma, in x-space
    else:
        a, b = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        target = {"sample": (1.0, 0.0), "epsilon": (0.0, 1.0), "v_prediction": (-b, a)}[prediction]
    gain = (target[0] * VARIANCE * a + target[1] * b) / (a**2 * VARIANCE + b**2)
    return target[0] * MEAN + gain * (z - a * MEAN)


PROCESS = {"sample": "vp", "epsilon": "vp", "v_prediction": "vp", "flow_prediction": "flow", "score": "ve"}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sigma", [0.003, 0.6, 4.0, 150.0])
def test_the_ideal_network_gives_the_ideal_denoiser(prediction, sigma):
    level = torch.tensor(sigma, dtype=F64)
    x = MEAN + noise((3,), range(5), 1.0, dtype=F64) * math.sqrt(VARIANCE + sigma**2)
    z = input_of(x, level, PROCESS[prediction])
    got = denoised_of(truth(z, level, prediction), x, level, prediction)
    torch.testing.assert_close(got, gaussian()(x, level), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_one_sigma_per_sample(prediction):
    levels = torch.tensor([0.05, 1.3, 60.0], dtype=F64)
    x = MEAN + noise((3,), range(3), 1.0, dtype=F64) * levels[:, None]
    z = input_of(x, levels, PROCESS[prediction])
    per_row = torch.stack([truth(z[b], levels[b], prediction) for b in range(3)])
    got = denoised_of(per_row, x, levels, prediction)
    torch.testing.assert_close(got, gaussian()(x, levels), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output_of(got, x, levels, prediction), per_row, rtol=1e-7, atol=1e-7)


@given(
    prediction=st.sampled_from(PREDICTIONS),
    sigma=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**32),
    dim=st.integers(1, 4),
)
def test_there_and_back(prediction, sigma, seed, dim):
    level = torch.tensor(sigma, dtype=F64)
    x, denoised = noise((dim,), [seed], sigma, dtype=F64), noise((dim,), [seed + 1], 1.0, dtype=F64)
    again = denoised_of(output_of(denoised, x, level, prediction), x, level, prediction)
    torch.testing.assert_close(again, denoised, rtol=1e-9, atol=1e-9 * (1 + sigma))


@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "flow_prediction"])
def test_infinity_is_the_limit(prediction):
    """At infinite sigma x stands for z; the conversion there is the limit of those at large sigma."""
    z = noise((3,), range(4), 1.0, dtype=F64)
    far = torch.tensor(1e7, dtype=F64)
    output = noise((3,), range(4, 8), 1.0, dtype=F64)
    there = denoised_of(output, z, torch.tensor(math.inf, dtype=F64), prediction)
    if prediction == "flow_prediction":  # z = x/(1 + sigma) keeps its distance from x/sigma
        near = denoised_of(output, (1 + far) * z, far, prediction)
    else:
        near = denoised_of(output, (1 + far**2).sqrt() * z, far, prediction)
    wanted = near if prediction != "v_prediction" else near - z / (1 + far**2).sqrt()
    torch.testing.assert_close(there, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(input_of(z, torch.tensor(math.inf), "flow"), z)


@pytest.mark.parametrize("prediction", ["epsilon", "score"])
def test_noise_predictions_say_nothing_at_infinity(prediction):
    z = torch.zeros(1, 3)
    with pytest.raises(FanalError, match="says nothing about x0 at infinite sigma"):
        denoised_of(z, z, torch.tensor(math.inf), prediction)
    with pytest.raises(FanalError, match="ask the network"):
        output_of(z, z, torch.tensor(math.inf), "sample")


def test_unknown_names_are_refused():
    x, sigma = torch.zeros(1, 2), torch.tensor(1.0)
    with pytest.raises(FanalError, match="unknown prediction 'v'.*known: epsilon"):
        denoised_of(x, x, sigma, "v")
    with pytest.raises(FanalError, match="unknown prediction"):
        output_of(x, x, sigma, "noise")
    with pytest.raises(FanalError, match="unknown process 'vpp'.*did you mean 'vp'"):
        input_of(x, sigma, "vpp")
    assert set(PROCESS.values()) == set(PROCESSES)


# Runs that start at infinity.


class Flow:
    """The ideal flow network of the Gaussian, asked in x-space, or in z-space at infinity."""

    shape, sigma_min, sigma_max = (3,), 0.0, math.inf

    def __call__(self, x, sigma):
        z = input_of(x, sigma, "flow")
        if sigma.ndim == 0 and math.isinf(sigma):
            return denoised_of(z - MEAN, x, sigma, "flow_prediction")  # E[n − x0 | z = n]
        return denoised_of(truth(z, expand(sigma, x), "flow_prediction"), x, sigma, "flow_prediction")


def test_a_run_from_infinity_takes_one_exact_step_and_goes_on():
    grid = torch.tensor([math.inf, 30.0, 5.0, 1.0, 0.2, 0.0], dtype=F64)
    D = Counted(Flow())
    z = noise((3,), range(6), math.inf, dtype=F64)
    assert torch.equal(z, noise((3,), range(6), 1.0, dtype=F64))
    run = list(trace(D, z, grid, Euler()))
    assert D.calls == 5
    first = run[0]
    assert math.isinf(first.span.sigma)
    torch.testing.assert_close(first.step.denoised, MEAN.expand(6, 3))
    torch.testing.assert_close(first.step.x_next, MEAN + 30.0 * z)
    # The rest is a run from 30 like any other.
    torch.testing.assert_close(run[-1].step.x_next, sample(gaussian(), MEAN + 30.0 * z, grid[1:], Euler()))


def test_from_infinity_the_law_is_the_datas():
    """Exact flow in z-space from t = 1: with a fine grid below, z goes to MEAN + √VARIANCE·z."""
    grid = torch.cat([torch.tensor([math.inf], dtype=F64), polynomial(200, 1e-3, 2000.0)])
    z = noise((3,), range(50), math.inf, dtype=F64)
    end = sample(Flow(), z, grid, Heun())
    torch.testing.assert_close(end, MEAN + math.sqrt(VARIANCE) * z, rtol=0, atol=2e-3)


def test_only_the_first_node_may_be_infinite():
    inf = math.inf
    assert math.isinf(check_sigmas([inf, 1.0, 0.0])[0])
    for bad in ([1.0, inf], [inf, inf, 1.0], [0.1, 1.0, inf], [inf, math.nan]):
        with pytest.raises(FanalError, match="sigmas"):
            check_sigmas(bad)


# Discrete times.


def betas(zero=False):
    table = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
    alphas = (1 - table).cumprod(0)
    if zero:  # Lin et al. 2024, algorithm 1
        root = alphas.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alphas = root**2
    return alphas


@pytest.mark.parametrize("zero", [False, True])
def test_whole_times_keep_the_tables_numbers(zero):
    table = Timesteps.of_alphas(betas(zero))
    times = torch.arange(1000, dtype=F64)
    assert torch.equal(table.sigma_of(times), table.sigmas)
    torch.testing.assert_close(table.time_of(table.sigmas), times, rtol=0, atol=1e-9)
    assert math.isinf(table.sigma_max) is zero
    assert table.sigma_min == pytest.approx(math.sqrt(0.00085 / (1 - 0.00085)))


@pytest.mark.parametrize("zero", [False, True])
def test_times_between_are_inverted(zero):
    table = Timesteps.of_alphas(betas(zero))
    times = torch.linspace(0, 998.97, 700, dtype=F64)
    torch.testing.assert_close(table.time_of(table.sigma_of(times)), times, rtol=0, atol=1e-7)
    assert bool((table.sigma_of(times).diff() > 0).all())
    middle = table.sigma_of(torch.tensor(500.5, dtype=F64))
    assert float(middle) == pytest.approx(float((table.sigmas[500] * table.sigmas[501]).sqrt()))


def test_times_outside_are_the_ends():
    table = Timesteps.of_alphas(betas())
    assert table.time_of(torch.tensor([1e-9, 1e9])).tolist() == [0.0, 999.0]


@pytest.mark.parametrize("alphas", [[0.5, 0.9], [0.9, 0.9], [0.0, 0.5], [0.9, 0.0, 0.0], [1.0, 0.5]])
def test_no_table(alphas):
    with pytest.raises(FanalError, match="strictly increasing"):
        Timesteps.of_alphas(torch.tensor(alphas, dtype=F64))
