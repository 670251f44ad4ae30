"""Guards of RODS in use: cost, gradients, records, mistakes, names."""

from __future__ import annotations

import math

import pytest
import torch

import fanal
from fanal import schedules
from fanal.config import build_solver
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.hallucination import repair, rods
from fanal.metrics import auc
from fanal.sampling import Span, sample, trace
from fanal.solvers import Ancestral, Churn, DPMpp, Euler, Heun
from fanal.trajectory import Trajectory
from guards import GRID, INSIDE, level, plan
from problems import mixture, run, start
from toys import fanal as command
from toys import record, refused, samples

F64 = torch.float64


# --- cost, gradients, records -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "calls", "products"),
    [
        ({}, 2, 1),
        ({"method": "sas"}, 2, 0),
        ({"method": "random"}, 2, 0),
        ({"method": "reversed"}, 2, 1),
        ({"threshold": math.inf}, 2, 2),
        ({"threshold": 0.0}, 2, 2),
        ({"threshold": 0.0, "method": "sas"}, 3, 2),
        ({"steps": 5}, 6, 5),
        ({"steps": 5, "method": "sas"}, 6, 0),
        ({"product": "difference"}, 3, 0),
        ({"product": "forward"}, 3, 1),
        ({"window": (5, 6)}, 1, 0),
        ({"solver": Heun()}, 3, 1),
        ({"solver": Heun(), "threshold": 0.0}, 3, 2),
    ],
)
def test_calls_and_products_are_counted_as_they_are_made(options, calls, products):
    backward = []

    class Passes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.view_as(y)

        @staticmethod
        def backward(ctx, grad):
            backward.append(len(grad))
            return grad

    D = mixture()
    forward = options.get("product") == "forward"
    counted = Counted(D if forward else lambda y, sigma: D(Passes.apply(y), sigma))
    x = start(D)
    with torch.no_grad():
        step = rods.Guard(**options).step(counted, x, Span(0, 2, level(3.0), level(1.0), (1, 2, 3, 4)))
    assert counted.calls == calls
    assert forward or len(backward) == products
    assert step.info["rods_calls"].tolist() == [calls] * 4
    assert step.info["rods_products"].tolist() == [products] * 4


def test_gradients_reach_the_start_with_the_perturbation_held_fixed():
    D, x = mixture(), start(mixture(), 3, 2.0)
    span, guard = Span(0, 2, level(2.0), level(1.0)), rods.Guard(Heun(), rho=0.1, threshold=0.0)
    delta = plan(D, x, span.sigma, "cas", 0.1 * 2.0 * math.sqrt(2))
    inputs = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(guard.step(D, inputs, span).x_next.sum(), inputs)
    again = x.clone().requires_grad_()
    fixed = Heun().step(lambda y, s: D(y + delta, s) - delta, again, span).x_next
    (expected,) = torch.autograd.grad(fixed.sum(), again)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert not guard.step(D, x, span).x_next.requires_grad  # nothing that needs no gradient gets one
    with torch.no_grad():
        step = guard.step(D, inputs, span)
    assert not step.x_next.requires_grad
    torch.testing.assert_close(step.x_next, fixed.detach(), rtol=1e-12, atol=1e-12)


def test_it_runs_in_inference_mode():
    D, guard = fanal.load("grid2"), rods.Guard(Heun(), rho=0.1, threshold=0.0)
    with torch.inference_mode():
        x = fanal.noise((2,), range(4), 80.0) * 1
        found = sample(D, x, GRID, guard)
    assert torch.equal(found, sample(D, fanal.noise((2,), range(4), 80.0), GRID, guard))


def test_what_it_found_is_recorded_and_saved(tmp_path):
    D, guard = mixture(), rods.Guard(Heun(), rho=0.1, threshold=1e-3, **INSIDE)
    kept = Trajectory.record(trace(D, start(D), GRID, guard))
    kept.save(tmp_path / "run.safetensors")
    back = Trajectory.load(tmp_path / "run.safetensors")
    inside = torch.zeros(8, dtype=torch.bool)
    inside[2:5] = True
    assert torch.equal(back.info["rods_index"].isnan().all(1), ~inside)
    sigma = back.sigmas[:-1][inside]
    H = torch.stack([rods.index(D, back.x[i], float(s), rho=0.1)[0] for i, s in zip((2, 3, 4), sigma, strict=True)])
    torch.testing.assert_close(back.info["rods_index"][inside], H, rtol=1e-10, atol=1e-15)
    assert torch.equal(back.info["rods_corrected"][inside].bool(), H >= 1e-3)
    assert torch.equal(back.denoised[2], D(back.x[2], back.sigmas[2]))
    assert "denoised_next" in back.info


def test_the_index_is_a_detector_of_guarded_runs():
    D = fanal.load("grid2")
    seeds, grid = range(7000, 7600), schedules.polynomial(40)
    guard = rods.Guard(rho=0.1, threshold=math.inf, v="residual", window=(0.05, 2.0), window_units="sigma")
    found = repair.watch(D, fanal.noise(D.shape, seeds, 80.0), grid, guard, rods.Curvature((0.05, 2.0)), seeds)
    wrong = fanal.datasets.get("grid2").verify(found.x) != 0
    area = auc(found.risk, wrong)
    # far from chance: a useless detector has 0.5, and this one 0.9 with an error near 0.03
    assert int(wrong.sum()) >= 4
    assert area.value > 0.8
    assert found.per_step.shape == (40, 600)
    assert bool((found.per_step.diff(dim=0) >= 0).all())
    assert torch.equal(found.per_step[-1], found.risk)
    with pytest.raises(FanalError, match="run a rods.Guard with a threshold"):
        repair.watch(D, fanal.noise(D.shape, seeds, 80.0), grid, Euler(), rods.Curvature(), seeds)


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "cass"}, "did you mean 'cas'"),
        ({"rho": -1.0}, "rho >= 0, got -1.0"),
        ({"rho": math.nan}, "rho >= 0"),
        ({"rho_units": "pixels"}, "shell"),
        ({"window": (5, 2)}, "low <= high"),
        ({"window": (2, 3), "window_units": "fraction"}, "between 0 and 1"),
        ({"window": (-1, 3)}, "low <= high"),
        ({"window": 4}, "low <= high"),
        ({"window_units": "percent"}, "fraction"),
        ({"threshold": math.nan}, "threshold"),
        ({"threshold": [[1.0]]}, "threshold"),
        ({"threshold": "much"}, "threshold"),
        ({"v": "noise"}, "score"),
        ({"steps": 0}, "gradient steps >= 1, got 0"),
        ({"steps": 1.5}, "gradient steps"),
        ({"product": "sideways"}, "backward"),
        ({"solver": Euler}, "step method"),
        ({"solver": "euler"}, "step method"),
    ],
)
def test_a_wrong_guard_is_refused(options, words):
    with pytest.raises(FanalError, match=words):
        rods.Guard(**options)


def test_mistakes_that_show_in_a_run_are_told():
    D, x = mixture(), start(mixture())
    with pytest.raises(FanalError, match="3 thresholds, one per step, for a grid of 8"):
        run(D, x, GRID, rods.Guard(threshold=(0.1, 0.2, 0.3)))
    with pytest.raises(FanalError, match='no gradient.*product="difference"'):
        run(lambda y, sigma: D(y.detach(), sigma).detach(), x, GRID, rods.Guard())
    assert (
        run(lambda y, sigma: D(y.detach(), sigma).detach(), x, GRID, rods.Guard(product="difference")).isfinite().all()
    )
    with pytest.raises(FanalError, match="sigma > 0"):
        rods.index(D, x, 0.0)
    assert rods.Guard(threshold=torch.tensor([0.25, 0.5])).threshold == (0.25, 0.5)


def test_a_point_that_is_its_own_prediction_is_not_moved():
    D = Gaussian(torch.zeros(3, dtype=F64), 1.0)
    x = torch.zeros(2, 3, dtype=F64)
    for product in ("backward", "forward", "difference"):
        H, delta = rods.index(D, x, 1.0, product=product)
        assert H.tolist() == [0.0, 0.0]
        assert not delta.any()


# --- by name ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "guard"),
    [
        ("rods", rods.Guard()),
        ("rods:rho=0.3,rho_units=sigma", rods.Guard(rho=0.3, rho_units="sigma")),
        ("rods:solver=heun,window=4..20", rods.Guard(Heun(), window=(4.0, 20.0))),
        ("rods:threshold=inf,v=residual,steps=5", rods.Guard(threshold=math.inf, v="residual", steps=5)),
        ("rods:window=0.1..0.5,window_units=fraction", rods.Guard(window=(0.1, 0.5), window_units="fraction")),
        ("rods:solver=churn:s_churn=3", rods.Guard(Churn(s_churn=3.0))),
        ("rods:solver=(dpmpp:order=3,predict=noise),method=sas", rods.Guard(DPMpp(3, predict="noise"), "sas")),
        ("rods:solver=(ancestral:solver=(churn:s_churn=3,s_min=1),eta=0.5)", None),
        ("ancestral:solver=rods:rho=0.2", Ancestral(rods.Guard(rho=0.2))),
    ],
)
def test_a_guard_has_a_name_on_the_command_line(text, guard):
    expected = guard or rods.Guard(Ancestral(Churn(s_churn=3.0, s_min=1.0), eta=0.5))
    assert build_solver(text) == expected


def test_a_run_folder_of_a_guarded_model(tmp_path):
    out = tmp_path / "out"
    spec = "rods:solver=euler,method=cas,rho=0.1,window=16..32"
    assert command("sample", "grid2", "--solver", spec, "--count", 8, "--out", out).exit_code == 0
    D = fanal.load("grid2")
    x = fanal.noise(D.shape, range(8), 80.0)
    direct = sample(D, x, schedules.polynomial(40), rods.Guard(rho=0.1, window=(16, 32)))
    assert torch.equal(samples(out)["x"], direct)
    assert record(out)["network"]["calls"] == 40 + 16
    refused(command("sample", "grid2", "--solver", "rods:rho=x", "--out", tmp_path / "no"), "rods:rho", "'x'")
    refused(
        command("sample", "grid2", "--solver", "rods:windw=1..2", "--out", tmp_path / "no"), "did you mean 'window'"
    )
