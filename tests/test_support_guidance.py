"""Guided runs on supports ([SUP]): what the theory says of them, where it fails, and what the instruments measure."""

from __future__ import annotations

import math

import pytest
import torch

import fanal
from fanal.datasets import get
from fanal.denoiser import take
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.guidance import Classifier, ClassifierFree, Reward
from fanal.metrics import rate
from fanal.schedules import logsnr, polynomial
from fanal.seeding import noise
from fanal.solvers import DDPM, Euler
from fanal.summary import as_json
from fanal.supports import TARGETS, FiniteSet, target
from fanal.supports.forms import FORMS, exact, guided
from fanal.supports.landing import figures, land
from fanal.supports.perturbation import Blurred, Perturbed
from fanal.supports.processes import PROCESSES, process
from fanal.supports.targets import chain
from toys import record


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def start(goal, count=48):
    return noise(goal.shape, range(count), 80.0, dtype=torch.float64), range(count)


@pytest.mark.parametrize("name", TARGETS)
def test_the_condition_is_a_part_of_the_whole(name):
    """Points of S_c lie on S; the way leads from the mean of p to that of p(x|c), by the denoisers at large sigma."""
    goal = target(name)
    x = goal.part.project(noise(goal.shape, range(64), 2.0, dtype=torch.float64))
    part, whole = goal.distances(x)
    assert float(part.max()) < 1e-12
    assert float(whole.max()) < 1e-12
    far, origin = t(1e4)[0], torch.zeros(1, *goal.shape, dtype=torch.float64)
    way = (goal.part(origin, far) - goal.whole(origin, far))[0]
    assert torch.allclose(way / way.norm(), goal.way, atol=1e-5)
    assert float((goal.part(origin, far)[0] * goal.way).sum()) == pytest.approx(goal.level, abs=1e-5)


@pytest.mark.parametrize("name", ["circle", "square", "segments", "spheres"])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "eta0.5", "eta2"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_exponential_integrators_of_order_1_end_on_benign_supports(name, solver, scale):
    """The claim of [SUP] at 5 steps: within a tenth of the last noise level of the support, for any scale."""
    goal = target(name)
    x, seeds = start(goal)
    landed = land(goal, guided("classifier-free", goal, exact(goal), scale), x, polynomial(5), process(solver), seeds)
    assert float(landed.part.max()) < 2e-4


def test_euler_maruyama_leaves_the_support_with_exact_scores():
    goal = target("circle")
    x, seeds = start(goal)
    denoiser = guided("classifier-free", goal, exact(goal), 30.0)
    landed = land(goal, denoiser, x, polynomial(2), process("maruyama"), seeds)
    assert float((landed.whole > 1).double().mean()) > 0.25  # 16 of 48; DDIM and DDPM: none, above


def test_an_outlier_behind_the_condition_is_a_counter_example_that_fine_steps_cure():
    """Exact scores, DDIM. Behind the condition the outlier u is nearest in S, and `u + w(c − u)` is far away."""
    goal = target("outlier")
    x, seeds = start(goal)
    denoiser = ClassifierFree(goal.part, goal.whole, 30.0)
    two = land(goal, denoiser, x, polynomial(2), Euler(), seeds)
    # The first step lands at w(c − mean) + mean; there D_u is the outlier and D_w = 2.2 + 30·(1 − 2.2).
    assert torch.allclose(two.x[:, 0], t(2.2 + 30 * (1 - 2.2)), atol=1e-6)
    assert float(land(goal, denoiser, x, logsnr(640), Euler(), seeds).part.max()) < 1e-6


@pytest.mark.parametrize("scale", [5.0, 20.0, 80.0])
def test_steps_no_longer_than_one_over_the_scale_end_on_the_support_of_the_counter_example(scale):
    """Behind the condition a step of log sigma by h moves by about w·h times the gap: at w·h = 1 not past S again."""
    goal = target("outlier")
    x, seeds = start(goal, 24)
    denoiser = ClassifierFree(goal.part, goal.whole, scale)
    steps = math.ceil(scale * math.log(80 / 0.002))
    assert float(land(goal, denoiser, x, logsnr(steps), Euler(), seeds).part.max()) < 1e-6
    if scale == 20:  # w·h = 13
        assert float(land(goal, denoiser, x, logsnr(16), Euler(), seeds).part.min()) > 10


def test_in_the_limit_of_small_noise_a_function_of_the_distances_falls_at_least_as_sigma_squared():
    """`V = w·d_c² − (w − 1)·d²` along the guided ODE with projections for denoisers: `√V/sigma` never rises.

    d is the distance to S, d_c that to S_c, so `V >= d_c²`: a run ends within sigma·√(V0)/sigma0 of the condition.
    """
    corners = t([-1.0, 0.2], [-0.3, -0.8], [0.4, 0.1], [0.9, -0.5], [0.2, 0.9])
    goal = chain("zigzag", corners, 1, 3, "")
    x, scale = noise((2,), range(64), 2.0, dtype=torch.float64), 8.0
    grid = logsnr(2000, 1e-3, 1.0, zero=False)

    def potential(x):
        part, whole = goal.distances(x)
        return scale * part**2 - (scale - 1) * whole**2

    first = potential(x)
    assert bool((first >= goal.distances(x)[0] ** 2 - 1e-12).all())
    for near, far in zip(grid[1:], grid[:-1], strict=True):
        aim = goal.whole.project(x) + scale * (goal.part.project(x) - goal.whole.project(x))
        x = aim + near / far * (x - aim)
    # A step over a kink of S may raise V by the order of w·h times it; h = log(1000)/2000.
    bound = first.sqrt() * float(grid[-1] / grid[0])
    assert bool((potential(x).clamp_min(0).sqrt() <= 1.05 * bound + 1e-9).all())
    assert bool((goal.distances(x)[0] <= 1.05 * bound + 1e-9).all())


@pytest.mark.parametrize("name", TARGETS)
def test_a_classifier_and_classifier_free_guidance_are_one_with_exact_scores(name):
    goal = target(name)
    x = noise(goal.shape, range(16), 1.5, dtype=torch.float64)
    for sigma in (3.0, 0.4):
        free = guided("classifier-free", goal, exact(goal), 7.0)(x, t(sigma)[0])
        assert torch.allclose(guided("classifier", goal, exact(goal), 7.0)(x, t(sigma)[0]), free, atol=1e-6)


@pytest.mark.parametrize("form", [name for name in FORMS if name != "interval"])
def test_forms_act_in_a_window(form):
    """Outside it the forms that lead to the condition are D_c, the others D_u."""
    goal, scores = target("outlier"), exact(target("outlier"))
    x, levels = noise((2,), range(4), 2.0, dtype=torch.float64), t(0.1, 1.0, 2.0, 9.0)
    got = guided(form, goal, scores, 4.0, (0.5, 2.0))(x, levels)
    leads = form in ("classifier-free", "autoguidance")
    rest, full = (scores.told if leads else scores.free)(x, levels), guided(form, goal, scores, 4.0)(x, levels)
    assert torch.allclose(got[[0, 3]], rest[[0, 3]], atol=1e-12)
    assert torch.allclose(got[[1, 2]], full[[1, 2]], atol=1e-12)
    assert not torch.allclose(full, rest, atol=1e-3)
    if form == "negative":
        assert torch.allclose(full, scores.free(x, levels) * 5 - 4 * scores.told(x, levels), atol=1e-9)


def test_perturbed_scores_are_wrong_by_the_share_and_by_a_function():
    goal = target("circle")
    wrong = Perturbed(goal.part, 0.05, 1)
    x = noise((2,), range(64), 1.0, dtype=torch.float64)
    for sigma in (0.01, 1.0, 40.0):
        level = t(sigma)[0]
        right = goal.part(x, level)
        error = (wrong(x, level) - right).norm(dim=1) / (right - x).norm(dim=1)
        assert torch.allclose(error, torch.full_like(error, 0.05), rtol=1e-6)
        assert torch.equal(wrong(x, level), wrong(x, level))
        assert torch.allclose(wrong(x[:3], level), wrong(x, level)[:3])  # of the state alone
    field = wrong.field(x, t(1.0)[0])
    near = wrong.field(x + 1e-4, t(1.0)[0])
    assert float((near - field).norm(dim=1).median()) < 1e-2  # smooth
    assert torch.equal(Perturbed(goal.part, 0.0)(x, t(1.0)[0]), goal.part(x, t(1.0)[0]))


@pytest.mark.parametrize("d", [2, 64])
def test_wrong_scores_err_independently_and_as_smoothly_in_any_dimension(d):
    """By seeds the cosine of two fields has the mean 0 and the variance 1/d of random directions in d dimensions."""
    law, level = Gaussian(torch.zeros(d, dtype=torch.float64), 1.0), t(0.7)[0]
    x, step = noise((d,), range(8), 1.0, dtype=torch.float64), 0.1 * noise((d,), range(8, 16), 1.0, dtype=torch.float64)
    fields = torch.stack([Perturbed(law, 0.1, seed).field(x, level) for seed in range(400)])
    cosines = (fields[::2] * fields[1::2]).sum(2).mean(1)  # of 200 pairs
    assert abs(float(cosines.mean())) < 4 * float(cosines.std()) / math.sqrt(200)
    squares = (fields[::2] * fields[1::2]).sum(2).square().mean(1)
    assert abs(float(squares.mean()) - 1 / d) < 4 * float(squares.std()) / math.sqrt(200)
    moved = torch.stack([Perturbed(law, 0.1, seed).field(x + step, level) for seed in range(0, 400, 4)])
    # Each wave turns by 2·0.1/√(1 + 0.7²) = 0.16 in root mean square, and each coordinate of the field with it.
    assert 0.05 < float((moved - fields[::4]).norm(dim=2).median()) < 0.2


def test_a_blurred_law_is_the_gaussian_of_larger_variance():
    law, wide = Gaussian(t(1.0, -2.0), 0.3), Gaussian(t(1.0, -2.0), 0.3 + 0.7**2)
    x = noise((2,), range(8), 2.0, dtype=torch.float64)
    for sigma in (0.1, 1.0, 9.0):
        assert torch.allclose(Blurred(law, 0.7)(x, t(sigma)[0]), wide(x, t(sigma)[0]), atol=1e-10)


@pytest.mark.parametrize("make", [Classifier, Reward])
def test_gradient_guidance_takes_one_scale_per_sample(make):
    law = Gaussian(t(1.0, -2.0), 0.5)
    x, scales, level = noise((2,), range(5), 2.0, dtype=torch.float64), t(0.0, 1.0, -2.0, 4.0, 0.5), t(1.3)[0]

    def value(x, sigma=None):
        return (x * x.new_tensor([1.0, 0.5])).sum(1)

    whole = make(law, value, scales)
    each = torch.cat([make(law, value, float(w))(x[i : i + 1], level) for i, w in enumerate(scales)])
    assert torch.allclose(whole(x, level), each, atol=1e-12)
    rows = torch.tensor([3, 1])
    assert torch.allclose(take(whole, rows)(x[rows], level), each[rows], atol=1e-12)
    with pytest.raises(FanalError, match="5 scales"):
        whole(x[:2], level)


def test_a_class_of_a_data_set_is_a_target():
    goal, digits = target("digits8", 3), get("digits8").data("train")
    assert isinstance(goal.whole, FiniteSet)
    assert isinstance(goal.part, FiniteSet)
    assert digits.labels is not None
    points = digits.x[digits.labels == 3][:5].double()
    part, whole = goal.distances(points)
    assert float(part.max()) == float(whole.max()) == 0
    x, seeds = start(goal, 8)
    landed = land(goal, guided("classifier-free", goal, exact(goal), 2.0), x, polynomial(10), DDPM(), seeds)
    assert float(landed.part.max()) < 1e-4


def test_processes_are_the_solvers_that_they_name():
    goal = target("circle")
    x, seeds = start(goal, 6)
    denoiser, grid = guided("classifier-free", goal, exact(goal), 2.0), polynomial(12)
    names = {"ddim": Euler(), "ddpm": DDPM()}
    for name, solver in names.items():
        assert torch.equal(
            fanal.sample(denoiser, x, grid, process(name), seeds), fanal.sample(denoiser, x, grid, solver, seeds)
        )
    assert set(PROCESSES) >= {"exponential2", "exponential3", "eta0.5", "maruyama"}
    for text, word in (("nothing", "unknown process"), ("grid.json", "solver such as heun")):
        with pytest.raises(FanalError, match=word):
            process(text)


def test_figures_are_quantiles_and_shares():
    found = figures(torch.arange(101, dtype=torch.float64), 89.5)
    assert (found["q50"], found["q90"], found["q99"], found["worst"]) == (50, 90, 99, 100)
    assert found["off"] == as_json(rate(torch.arange(101) > 89.5))


def test_mistakes_are_told():
    goal = target("circle")
    for call, word in (
        (lambda: target("cirlce"), "circle"),
        (lambda: target("circle", 2), "own condition"),
        (lambda: target("grid2", 1), "no classes"),
        (lambda: target("digits8", 12), "0 to 9"),
        (lambda: guided("clasifier", goal, exact(goal), 1.0), "classifier"),
        (lambda: chain("all", t([0.0, 0.0], [1.0, 0.0]), 0, 1, ""), "not none or all"),
        (lambda: Perturbed(goal.part, -0.1), "relative error"),
        (lambda: Blurred(goal.part, -0.1), "blur"),
    ):
        with pytest.raises(FanalError, match=word):
            call()
    assert set(FORMS) >= {"autoguidance", "negative", "inverse"}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("sigma", [0.002, 0.1, 80.0])
def test_denoisers_have_the_derivatives_that_differences_give_at_any_noise(name, sigma):
    """Deep inside, far outside and in between, as gradient guidance and the search for counter-examples need them."""
    law, level = target(name).whole, t(sigma)[0]
    near, far = (noise(law.shape, range(count), size, dtype=torch.float64) for count, size in ((12, 1.0), (4, 80.0)))
    x, way = torch.cat([near, far]), noise(law.shape, range(16, 32), dtype=torch.float64)
    point = x.clone().requires_grad_()
    (own,) = torch.autograd.grad((law(point, level) * way).sum(), point)
    step = 1e-6 * max(sigma, 0.1)
    for axis in torch.eye(*law.shape, dtype=torch.float64):
        ends = [(law(x + sign * step * axis, level) * way).sum(1) for sign in (1, -1)]
        assert torch.allclose((own * axis).sum(1), (ends[0] - ends[1]) / (2 * step), rtol=1e-3, atol=2e-5)


def test_a_measurement_needs_a_scale_that_gives_it_noise():
    goal = target("circle")
    for scale in (-1.0, -2.0, math.nan):
        with pytest.raises(FanalError, match="inverse guidance needs a scale above -1"):
            guided("inverse", goal, exact(goal), scale)


def test_a_guided_run_can_be_drawn_for_papers_and_knows_its_data(tmp_path):
    """There is one state more than predictions; images that were changed do not go on with an old run."""
    from PIL import Image

    from fanal.report import write_figures
    from fanal.supports.command import GuideConfig, guide

    folder = guide(GuideConfig(count=32, steps=5), tmp_path / "circle")
    assert write_figures(folder, ("png",))
    for own in ("a", "b"):
        (tmp_path / "images" / own).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (4, 4), 40 * i + 20).save(tmp_path / "images" / own / f"{i}.png")
    config = GuideConfig(support=f"folder:{tmp_path / 'images'}", count=4, steps=3)
    first = record(guide(config, tmp_path / "run"))["identity"]
    Image.new("L", (4, 4), 255).save(tmp_path / "images" / "a" / "0.png")
    assert record(guide(config, tmp_path / "again"))["identity"] != first
