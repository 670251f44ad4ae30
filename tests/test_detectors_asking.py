"""Detectors that ask the network: against closed forms and products by hand, and every question is counted."""

from __future__ import annotations

import math

import pytest
import torch

import fanal
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.hallucination import Redo, Renoise, rods, watch
from fanal.hallucination.detectors import GradientNorm, JacobianProbe, RodsIndex, begin, build
from fanal.hallucination.observation import observe_block
from fanal.sampling import Span, Step, Transition
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import Churn, Euler, Heun
from fanal.trajectory import Trajectory
from toys import blurred, mixture

COUNT, GRID = 24, polynomial(20)
WINDOW = (0.1, 3.0)
INSIDE = [i for i, sigma in enumerate(GRID[:-1].tolist()) if WINDOW[0] <= sigma <= WINDOW[1]]


def start():
    return noise((2,), range(COUNT), 80.0, dtype=torch.float64)


def at(model, point, sigma, count):
    """A transition in which `count` samples are at one point."""
    x, level = point.expand(count, *point.shape[1:]), torch.tensor(sigma, dtype=torch.float64)
    span = Span(3, 9, level, level / 2, tuple(range(count)))
    return Transition(span, x, Step(x, model(x, level)))


@pytest.mark.parametrize("probes", [1, 3])
def test_the_probes_mean_square_is_the_jacobians(probes):
    # 4,000 seeded probes; the mean is within five standard errors, so chance fails it once in a million
    model, point, sigma = mixture(), torch.tensor([[0.93, 0.2]], dtype=torch.float64), 0.4
    exact = torch.func.jacrev(lambda y: model(y[None], torch.tensor(sigma))[0])(point[0])
    wanted = float(exact.square().sum()) / 2
    detector = JacobianProbe((0.0, 1.0), radius=1e-4, probes=probes)
    transition = at(model, point, sigma, 4000)
    eye = begin(detector, model)
    eye.see(transition)
    squares = eye.risk().square()
    assert abs(float(squares.mean()) - wanted) < 5 * float(squares.std()) / math.sqrt(4000)


def test_a_linear_denoiser_has_one_jacobian_at_every_radius():
    cov = torch.tensor([0.01, 4.0, 1.0], dtype=torch.float64)
    model, sigma = Gaussian(torch.zeros(3), cov), 0.5
    transition = at(model, torch.ones(1, 3).double(), sigma, 50)
    small, large = (
        JacobianProbe((0.0, 1.0), radius=radius).measure(model, transition.x, torch.tensor(sigma).double(), transition)
        for radius in (0.01, 3.0)
    )
    assert torch.allclose(small, large, rtol=1e-9)


def test_the_gradient_norm_is_autograds():
    run = Trajectory.record(fanal.trace(mixture(), start(), GRID, Euler()))
    by_hand = []
    for i in INSIDE:
        x = run.x[i].clone().requires_grad_()
        (gradient,) = torch.autograd.grad((x - mixture()(x, run.sigmas[i])).norm(dim=1).sum(), x)
        by_hand.append(gradient.norm(dim=1))
    for over, wanted in (("mean", torch.stack(by_hand).mean(0)), ("max", torch.stack(by_hand).amax(0))):
        risk = watch(mixture(), start(), GRID, Euler(), GradientNorm(WINDOW, over=over), range(COUNT)).risk
        assert torch.allclose(risk, wanted, rtol=1e-9), over


@pytest.mark.parametrize("v", ["residual", "direction", "score"])
def test_the_index_is_that_of_a_guarded_run_and_of_the_function(v):
    settings = {"v": v, "rho": 0.2}
    own = watch(mixture(), start(), GRID, Euler(), RodsIndex(WINDOW, over="max", **settings), range(COUNT))
    guard = rods.Guard(threshold=math.inf, window=WINDOW, window_units="sigma", **settings)
    read = watch(mixture(), start(), GRID, guard, rods.Curvature(WINDOW), range(COUNT))
    assert torch.equal(own.x, read.x)
    assert torch.allclose(own.risk, read.risk, rtol=1e-9)
    run = Trajectory.record(fanal.trace(mixture(), start(), GRID, Euler()))
    found = torch.stack([rods.index(mixture(), run.x[i], run.sigmas[i], **settings)[0] for i in INSIDE])
    assert torch.allclose(own.risk, found.amax(0), rtol=1e-9)
    mean = watch(mixture(), start(), GRID, Euler(), RodsIndex(WINDOW, **settings), range(COUNT)).risk
    assert torch.allclose(mean, found.mean(0), rtol=1e-9)


QUESTIONS = {
    "jacobian": ({"probes": 2}, 2, 0),
    "gradient_norm": ({}, 1, 1),
    "rods_index": ({}, 2, 2),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_is_counted_at_the_network(name):
    options, calls, products = QUESTIONS[name]
    detector, model, k = build(name, WINDOW, **options), Counted(blurred()), len(INSIDE)
    outcome = watch(model, start(), GRID, Heun(), detector, range(COUNT))
    assert not detector.free
    assert (model.calls, model.products) == (39 + calls * k, products * k)
    assert (outcome.evaluations == 39 + calls * k).all()
    seen = observe_block(Counted(blurred()), start(), GRID, Heun(), {name: detector}, range(COUNT))
    assert (seen.evaluations, seen.costs[name].evaluations, seen.costs[name].products) == (39, calls * k, products * k)
    assert torch.equal(seen.risks[name], outcome.risk)


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("repair", [Redo(0.1, (0.1, 4.0)), Renoise(1.5, 2)])
def test_repairs_work_with_detectors_that_ask(name, repair):
    detector, model = build(name, WINDOW), Counted(blurred())
    first = watch(model, start(), GRID, Euler(), detector, range(COUNT))
    limit = float(first.risk.quantile(0.7))
    after = repair.repair(model, start(), GRID, Euler(), detector, range(COUNT), first, limit)
    assert float(after.evaluations.sum()) == model.evaluations
    kept = first.risk <= limit
    assert torch.equal(after.x[kept], first.x[kept])
    assert (after.rounds[~kept] > 0).all()


def test_questions_are_asked_where_the_step_asked():
    heard = []

    class Listening:
        def __call__(self, x, sigma):
            heard.append((x.detach().clone(), float(sigma)))
            return mixture()(x, sigma)

    eye = begin(GradientNorm(WINDOW), Listening())
    places = []
    for transition in fanal.trace(mixture(), start(), GRID, Churn(s_churn=40.0), range(COUNT)):
        eye.see(transition)
        if WINDOW[0] <= float(transition.span.sigma) <= WINDOW[1]:
            places.append(transition.step.at)
    assert len(heard) == len(places) == len(INSIDE)
    for (x, sigma), (wanted, level) in zip(heard, places, strict=True):
        assert torch.equal(x, wanted)
        assert sigma == float(level)


def test_probes_are_a_function_of_the_seed_alone():
    detector = JacobianProbe(WINDOW)
    whole = watch(blurred(), start(), GRID, Euler(), detector, range(COUNT)).risk
    half = watch(blurred(), start()[10:], GRID, Euler(), detector, range(10, COUNT)).risk
    assert torch.allclose(whole[10:], half, rtol=1e-9)
    other = watch(blurred(), start()[10:], GRID, Euler(), detector, range(COUNT - 10)).risk
    assert not torch.allclose(whole[10:], other, rtol=1e-3)


def test_what_is_missing_is_told():
    for name in QUESTIONS:
        with pytest.raises(FanalError, match="asks the network itself: start it with the run's denoiser"):
            build(name, WINDOW).start()
    eye = begin(JacobianProbe((0.0, math.inf)), blurred())
    first = next(fanal.trace(blurred(), start(), GRID, Euler()))
    with pytest.raises(FanalError, match="the probes are random: run trace with seeds"):
        eye.see(first)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("jacobian", {"radius": 0.0}, "radius must be a number > 0"),
        ("jacobian", {"radius": "wide"}, "radius must be a number > 0"),
        ("jacobian", {"probes": 0}, "whole number >= 1"),
        ("jacobian", {"probes": True}, "whole number >= 1"),
        ("jacobian", {"over": "median"}, "over of JacobianProbe"),
        ("gradient_norm", {"product": "sideways"}, "product of GradientNorm"),
        ("rods_index", {"v": "speed"}, "v of RodsIndex"),
        ("rods_index", {"rho": -1.0}, "rho >= 0"),
        ("rods_index", {"row": 1.0}, "rods_index has no option 'row': it has over, v, rho"),
    ],
)
def test_options_that_are_none_are_refused(name, options, words):
    with pytest.raises(FanalError, match=words):
        build(name, WINDOW, **options)
