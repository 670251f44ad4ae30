"""Guarded solvers as schedulers of diffusers pipelines: by question and answer, and as `fanal.sample` gives them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import fanal
from fanal.adapters.replay import Replay, plan
from fanal.config import build_solver, text_of
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.hallucination.rods import Guard
from fanal.solvers import Ancestral, Churn, Euler, Heun
from pipeline_runs import bound, network, own, pipelines_noise, run
from problems import mixture

diffusers = pytest.importorskip("diffusers")

from fanal.adapters.scheduler import FanalScheduler  # noqa: E402

F64 = torch.float64
SEEDS = range(5)

CALLING = {
    "sas": Guard(method="sas"),
    "sas, two steps": Guard(method="sas", steps=2),
    "random": Guard(method="random"),
    "cas": Guard(product="difference"),
    "cas, flagged only": Guard(product="difference", threshold=0.01),
    "around Heun": Guard(Heun(), product="difference", window=(1, 4)),
    "around churn": Guard(Churn(), product="difference", window=(1, 4)),
    "held": Guard(product="difference", hold=3, threshold=0.01),
    "lagging": Guard(product="difference", lag=True),
}


@pytest.mark.parametrize("name", CALLING)
@pytest.mark.parametrize("graph", [True, False])
def test_guards_that_only_call_are_the_loop_from_outside(name, graph):
    """Bit for bit and call for call, whether or not the caller's mode keeps graphs that nobody began."""
    solver, grid = CALLING[name], fanal.schedules.polynomial(7)
    D, x = Counted(mixture()), fanal.noise((2,), SEEDS, 80.0, dtype=F64)
    want = fanal.sample(D, x, grid, solver, SEEDS)
    with torch.set_grad_enabled(graph):
        ahead = plan(solver, grid)
        replay, calls = Replay(solver, grid, x, SEEDS, ahead.calls), 0
        while replay.point is not None:
            replay.tell(D.denoiser(*replay.point))
            calls += 1
    assert torch.equal(replay.x, want)
    assert calls == D.calls == sum(map(len, ahead.calls))


@pytest.mark.parametrize("product", ["backward", "forward"])
def test_products_need_the_network(product):
    with pytest.raises(FanalError, match="product=difference, which calls instead, or method=sas"):
        plan(Guard(product=product), fanal.schedules.polynomial(4))


def test_a_guard_whose_calls_depend_on_the_flags_is_refused():
    """Gated SAS asks once more where somebody is flagged, which nobody can foresee."""
    solver, grid = Guard(method="sas", product="difference", threshold=0.01), fanal.schedules.polynomial(7)
    x = fanal.noise((2,), SEEDS, 80.0, dtype=F64)
    replay = Replay(solver, grid, x, SEEDS, plan(solver, grid).calls)

    def answer():
        while replay.point is not None:
            replay.tell(mixture()(*replay.point))

    with pytest.raises(FanalError, match="depend on the answers"):
        answer()


def scheduled(name, solver, steps=5, **more):
    scheduler = FanalScheduler.from_scheduler(own(name), solver, seeds=[40, 41])
    return run(name, scheduler, steps=steps, **more)


@pytest.mark.parametrize("name", ["sd", "dit", "ddim"])
@pytest.mark.parametrize("kind", ["sas", "cas", "around Heun"])
def test_a_guarded_pipeline_is_what_sample_gives(name, kind):
    """With guidance where the pipeline guides: the guard perturbs the guided prediction, as fanal.sample does."""
    D, solver = bound(name), CALLING[kind]
    counted, grid = Counted(D), network(bound(name)).grid(5)
    x = pipelines_noise(name) * (1 + grid[0] ** 2).sqrt()
    want = fanal.sample(counted, x, grid, solver, range(40, 42))
    got, calls = scheduled(name, solver)
    kept = network(D).state_of(want, grid[-1]) if name == "sd" else network(D).decode(want) / 2 + 0.5
    assert calls == counted.calls
    plain, _ = scheduled(name, Heun() if kind == "around Heun" else Euler())
    # A difference of float32 predictions multiplies rounding, so the distance is seen against what the guard does.
    assert float((got - kept).norm()) < (1e-3 if kind == "sas" else 0.05) * float((got - plain).norm())


def test_an_infinite_threshold_changes_no_bit_of_a_pipeline():
    for solver in (Euler(), Heun(), Ancestral()):
        plain, calls = scheduled("sd", solver)
        got, more = scheduled("sd", Guard(solver, product="difference", threshold=math.inf))
        assert torch.equal(got, plain)
        assert more == calls + 3 * 5


def test_a_mixed_batch_changes_flagged_pictures_only():
    inf = Guard(product="difference", threshold=math.inf, window=(1, 3))
    D, grid = bound("sd"), network(bound("sd")).grid(5)
    x = pipelines_noise("sd") * (1 + grid[0] ** 2).sqrt()
    seen = torch.stack([t.step.info["rods_index"] for t in fanal.trace(D, x, grid, inf)])[1:3].max(0).values
    assert float((seen[0] - seen[1]).abs() / seen.max()) > 0.01
    solver = dataclasses.replace(inf, threshold=float(seen.double().mean()))
    plain, _ = scheduled("sd", Euler())
    got, _ = scheduled("sd", solver)
    flagged = seen >= seen.double().mean()
    assert torch.equal(got[~flagged], plain[~flagged])
    assert not torch.equal(got[flagged], plain[flagged])


def test_a_guarded_scheduler_can_be_saved(tmp_path):
    inner = "rods:solver=(churn:s_churn=3.0,solver=(dpmpp:order=3)),method=sas,window=2.0..5.0"
    solver = build_solver(inner)
    assert build_solver(text_of(solver)) == solver
    scheduler = FanalScheduler.from_scheduler(own("sd"), solver)
    scheduler.save_config(tmp_path)
    assert FanalScheduler.from_config(FanalScheduler.load_config(tmp_path)).solver == solver
    assert text_of(Guard(threshold=[0.1, 0.2, 0.3])) is None
    assert text_of(Guard(threshold=[0.1, 0.2])) is None
