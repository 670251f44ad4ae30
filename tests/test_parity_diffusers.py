"""diffusers' higher-order schedulers, live: the same numbers to 1e-9 in float64, at the same number of calls."""

import importlib
import math

import pytest
import torch

from fanal.adapters.predictions import Timesteps
from fanal.denoiser import Counted
from fanal.sampling import sample
from fanal.schedules import from_timesteps, polynomial
from fanal.solvers import DEIS, DPM2, DPMS, LMS, PNDM, SDE, DPMpp, UniPC
from peers import F64, SEEDS, Doubled, begin, drive_ve, fresh, run_vp
from problems import mixture

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

VARIANT = {"midpoint": "midpoint", "heun": "taylor"}
PREDICT = {"dpmsolver++": "data", "dpmsolver": "noise"}


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    """Undo the casts to float32 in the schedulers that have some."""
    pytest.importorskip("diffusers")
    for name in ("dpmsolver_multistep", "dpmsolver_singlestep"):
        monkeypatch.setattr(importlib.import_module(f"diffusers.schedulers.scheduling_{name}"), "torch", Doubled())


def grid(steps, end):
    """Our Karras grid within the range of the scheduler's own table."""
    return polynomial(steps, 0.03, 14.0, zero=end == "zero")


def ours(solver, sigmas):
    D = Counted(mixture())
    return sample(D, begin(sigmas[0]), sigmas, solver, SEEDS), D.calls


def same(mine, theirs):
    assert mine[1] == theirs[1]
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("steps", [5, 10, 14, 15, 20])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("variant", VARIANT)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmsolver_multistep(diffusers, order, variant, end, steps, lower):
    """The order falls at the end of grids with fewer than 15 intervals; into 0 it is 1 anyway."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=order,
        solver_type=variant,
        final_sigmas_type=end,
        lower_order_final=lower,
        prediction_type="sample",
    )
    solver = DPMpp(order, VARIANT[variant], 15 if lower else "never")
    same(ours(solver, grid(steps, end)), run_vp(scheduler, grid(steps, end)))


@pytest.mark.parametrize("steps", [5, 14, 15])
@pytest.mark.parametrize("variant", VARIANT)
@pytest.mark.parametrize("order", [2, 3])
def test_dpmsolver_multistep_of_noise(diffusers, order, variant, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=order, solver_type=variant, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
    )
    solver = DPMpp(order, VARIANT[variant], 15, predict="noise")
    same(ours(solver, grid(steps, "min")), run_vp(scheduler, grid(steps, "min"), "epsilon"))


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("variant", VARIANT)
@pytest.mark.parametrize("order", [1, 2])
def test_dpmsolver_multistep_sde(diffusers, order, variant, end):
    """Its stochastic form is ours with η = 1, given our noise."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=order,
        solver_type=variant,
        algorithm_type="sde-dpmsolver++",
        final_sigmas_type=end,
        prediction_type="sample",
    )
    sigmas = grid(9, end)
    theirs = run_vp(scheduler, sigmas, variance_noise=lambda i: fresh(i, "sde"))
    same(ours(SDE(order, variant=VARIANT[variant], lower_final=15), sigmas), theirs)


@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("steps", [5, 6, 7, 8, 9])
@pytest.mark.parametrize("variant", VARIANT)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmsolver_singlestep(diffusers, order, variant, steps, predict):
    """Its blocks have the grid's nodes inside."""
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        solver_order=order,
        solver_type=variant,
        algorithm_type=predict,
        final_sigmas_type="sigma_min",
        lower_order_final=True,
    )
    solver = DPMS(order, VARIANT[variant], "grid", "always", PREDICT[predict])
    same(ours(solver, grid(steps, "min")), run_vp(scheduler, grid(steps, "min"), "epsilon"))


@pytest.mark.parametrize("steps", [5, 6, 7])
def test_dpmsolver_singlestep_into_zero(diffusers, steps):
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        solver_order=3, final_sigmas_type="zero", lower_order_final=True, prediction_type="sample"
    )
    solver = DPMS(3, "midpoint", "grid", "always", "data")
    same(ours(solver, grid(steps, "zero")), run_vp(scheduler, grid(steps, "zero")))


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("steps", [5, 18])
@pytest.mark.parametrize("predict", ["data", "noise"])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(diffusers, order, variant, predict, steps, lower):
    """Its states are predictions, as ours are; the order falls at the end of every grid."""
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order,
        solver_type=variant,
        predict_x0=predict == "data",
        lower_order_final=lower,
        final_sigmas_type="sigma_min",
    )
    solver = UniPC(order, variant, "always" if lower else "never", predict)
    same(ours(solver, grid(steps, "min")), run_vp(scheduler, grid(steps, "min"), "epsilon"))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_into_zero(diffusers, order):
    scheduler = diffusers.UniPCMultistepScheduler(solver_order=order, final_sigmas_type="zero")
    same(ours(UniPC(order), grid(8, "zero")), run_vp(scheduler, grid(8, "zero"), "epsilon"))


@pytest.mark.parametrize("steps", [5, 14, 15])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(diffusers, order, steps):
    """Its DEIS is the polynomial in log sigma."""
    scheduler = diffusers.DEISMultistepScheduler(solver_order=order)
    same(
        ours(DEIS(order, "logrho", 15), grid(steps, "min")),
        run_vp(scheduler, grid(steps, "min"), "epsilon"),
    )


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms(diffusers, order):
    """With the formula into 0, where we would end at the denoised prediction."""
    scheduler = diffusers.LMSDiscreteScheduler(prediction_type="sample")
    sigmas = grid(9, "zero")
    scheduler.set_timesteps(9)
    scheduler.sigmas = sigmas
    D = Counted(mixture())
    theirs = drive_ve(scheduler, D, begin(sigmas[0]), "sample", order=order)
    same(ours(LMS(order, finish=False), sigmas), (theirs, D.calls))


def test_kdpm2(diffusers):
    """DPM-Solver-2 with the middle in log sigma."""
    scheduler, sigmas, steps = diffusers.KDPM2DiscreteScheduler(), grid(9, "zero"), 9
    scheduler.set_timesteps(steps)
    middle = (sigmas[:-1] * sigmas[1:]).sqrt()
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2), sigmas[-1:]])
    between = torch.cat([middle[:1], middle])
    scheduler.sigmas_interpol = torch.cat([between[:1], between[1:].repeat_interleave(2), between[-1:] * 0])
    D, x = Counted(mixture()), begin(sigmas[0])
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        i = scheduler.step_index
        sigma = scheduler.sigmas[i] if scheduler.state_in_first_order else scheduler.sigmas_interpol[i]
        x = scheduler.step((x - D(x, sigma)) / sigma, t, x).prev_sample
    same(ours(DPM2(), sigmas), (x, D.calls))


def drive_pndm(scheduler, steps):
    """PNDM knows timesteps alone: ask at each in turn, as its pipeline does, and count."""
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=F64)
    level = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    D, start = Counted(mixture()), level[scheduler.timesteps[0]]
    z = begin(start) / (1 + start**2).sqrt()
    for t in scheduler.timesteps:
        x = z * (1 + level[t] ** 2).sqrt()
        z = scheduler.step((x - D(x, level[t])) / level[t], int(t), z).prev_sample
    whole = torch.as_tensor(scheduler._timesteps[::-1].copy()).long()
    return (z, D.calls), from_timesteps(whole, scheduler.alphas_cumprod), Timesteps(level)


@pytest.mark.parametrize("steps", [4, 5, 10, 20])
def test_plms(diffusers, steps):
    """Heun's step first, one call more than steps; into 0 with the formula."""
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True)
    theirs, sigmas, _ = drive_pndm(scheduler, steps)
    assert theirs[1] == steps + 1
    same(ours(PNDM(warmup="heun", finish=False), sigmas), theirs)


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_pndm(diffusers, steps):
    """Three Runge–Kutta steps of four calls, with the middle of time, then the formula."""
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=False, set_alpha_to_one=True)
    theirs, sigmas, times = drive_pndm(scheduler, steps)
    assert theirs[1] == steps + 9
    same(ours(PNDM(finish=False, times=times), sigmas), theirs)


# What is known to differ.


def test_unipc_bh1_into_zero_is_nan_there_and_a_sample_here(diffusers):
    """Its default options: h is infinite and bh1 divides by it."""
    scheduler = diffusers.UniPCMultistepScheduler(solver_order=2, solver_type="bh1", final_sigmas_type="zero")
    theirs, _ = run_vp(scheduler, grid(8, "zero"), "epsilon")
    assert bool(torch.isnan(theirs).any())
    assert bool(torch.isfinite(ours(UniPC(2, "bh1"), grid(8, "zero"))[0]).all())


def test_the_third_order_of_its_stochastic_form_has_a_wrong_sign(diffusers):
    """`… − 0.5` where the expansion of the exponential has + 0.5; with the sign put right it is ours.

    Its term in the second difference then tends to −1 and not to 0 with the step, so it falls back to first order.
    """
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=3, solver_type="heun", algorithm_type="sde-dpmsolver++", prediction_type="sample"
    )
    sigmas = grid(9, "zero")
    theirs, _ = run_vp(scheduler, sigmas, variance_noise=lambda i: fresh(i, "sde"))
    mine, _ = ours(SDE(3, variant="taylor", lower_final=15, longest=math.inf), sigmas)
    gap = float((theirs - mine).abs().max())
    assert gap > 0.01

    def update(model_output_list, sample, noise):
        """The published formula, in z."""
        i = scheduler.step_index
        end, *past = (scheduler.sigmas[i + 1], *(scheduler.sigmas[i - k] for k in range(3)))
        h = math.log(past[0] / end)
        r0, r1 = (math.log(past[k + 1] / past[k]) / h for k in range(2))
        m0, m1, m2 = model_output_list[::-1]
        e0, e1 = (m0 - m1) / r0, (m1 - m2) / r1
        slope, bend = e0 + r0 / (r0 + r1) * (e0 - e1), (e0 - e1) / (r0 + r1)
        phi2 = (1 - math.exp(-2 * h)) / (-2 * h) + 1
        phi3 = (1 - math.exp(-2 * h) - 2 * h) / (2 * h) ** 2 + 0.5
        scale, scale_end = ((1 + s**2).sqrt() for s in (past[0], end))
        x = sample * scale * math.exp(-2 * h) + (1 - math.exp(-2 * h)) * m0 + phi2 * slope + phi3 * bend
        return (x + end * math.sqrt(1 - math.exp(-2 * h)) * noise) / scale_end

    scheduler.multistep_dpm_solver_third_order_update = update
    fixed, _ = run_vp(scheduler, sigmas, variance_noise=lambda i: fresh(i, "sde"))
    torch.testing.assert_close(mine, fixed, rtol=1e-9, atol=1e-9)
