"""Classifier-free guidance: what it computes, what it calls, and what it costs."""

from __future__ import annotations

import math

import pytest
import torch

import fanal
from fanal.config import NAMED, build_solver
from fanal.denoiser import Counted, Labelled, Temperature, take
from fanal.errors import FanalError
from fanal.exact import Gaussian, Mixture
from fanal.guidance import Classifier, ClassifierFree, Inverse, Reward
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import Euler, Heun
from toys import tiny

SIGMA = torch.tensor(1.7, dtype=torch.float64)


class Asked:
    """Remembers whether it was called."""

    def __init__(self, denoiser):
        self.denoiser, self.calls = denoiser, 0

    def __call__(self, x, sigma):
        self.calls += 1
        return self.denoiser(x, sigma)


def pair():
    mean = torch.tensor([1.0, -2.0], dtype=torch.float64)
    return Asked(Gaussian(mean, 0.3)), Asked(Gaussian(-mean, 1.5))


def states():
    return noise((2,), range(6), 2.0, dtype=torch.float64)


def test_it_is_the_affine_combination():
    conditional, free = pair()
    x = states()
    for scale in (-1.0, 0.5, 2.0, 7.5):
        wanted = free(x, SIGMA) + scale * (conditional(x, SIGMA) - free(x, SIGMA))
        assert torch.equal(ClassifierFree(conditional, free, scale)(x, SIGMA), wanted)


@pytest.mark.parametrize(("scale", "asked"), [(1, (1, 0)), (0, (0, 1)), (2.5, (1, 1))])
def test_scales_0_and_1_are_exact_and_cost_one_call(scale, asked):
    conditional, free = pair()
    got = ClassifierFree(conditional, free, scale)(states(), SIGMA)
    assert (conditional.calls, free.calls) == asked
    if scale in (0, 1):
        assert torch.equal(got, (conditional if scale else free)(states(), SIGMA))


def test_guided_gaussians_go_where_the_closed_form_says():
    # With a shared variance D_u and D_c differ by a constant, so guidance moves the mean: m_u + w(m_c − m_u).
    conditional, free = Gaussian(torch.tensor([1.0, 0.0]), 0.5), Gaussian(torch.tensor([0.0, 1.0]), 0.5)
    moved = Gaussian(torch.tensor([3.0, -2.0]), 0.5)
    x, grid = 40 * states(), polynomial(12)
    got = fanal.sample(ClassifierFree(conditional, free, 3.0), x, grid, Heun())
    assert torch.allclose(got, fanal.sample(moved, x, grid, Heun()), rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("conditional") / "model"
    tiny(path, classes=4)
    return str(path)


def test_a_loaded_model_counts_both_halves(folder):
    x, grid = noise((1, 8, 8), range(5), 80.0), polynomial(6)
    for guidance, each in ((None, 1), (1.0, 1), (0.0, 1), (3.0, 2)):
        model = fanal.load(folder, labels=2, guidance=guidance)
        fanal.sample(model, x, grid, Euler())
        inside = model
        while not isinstance(inside, Counted):
            inside = inside.denoiser
        assert inside.calls == 6  # both halves in one
        assert inside.evaluations == 5 * 6 * each


def test_a_loaded_model_guides_as_written(folder):
    bare, x = fanal.load(folder), noise((1, 8, 8), range(3), 2.0)
    sigma = torch.tensor(2.0)
    free, bound = bare(x, sigma), Labelled(bare, 3)(x, sigma)
    assert not torch.equal(free, bound)  # the label matters, or nothing here proves anything
    assert torch.equal(fanal.load(folder, labels=3, guidance=1)(x, sigma), bound)
    assert torch.equal(fanal.load(folder, labels=3)(x, sigma), bound)
    assert torch.equal(fanal.load(folder, labels=3, guidance=0)(x, sigma), free)
    twice = fanal.load(folder, labels=3, guidance=2)(x, sigma)
    torch.testing.assert_close(twice, free + 2 * (bound - free), rtol=1e-5, atol=1e-6)  # a batch of both halves rounds


def test_it_passes_on_what_the_model_knows(folder):
    model = fanal.load(folder, labels=1, guidance=2.0)
    assert (model.shape, model.sigma_min, model.sigma_max) == ((1, 8, 8), 0.002, 80.0)


class Network:
    """A network with two classes and the null label, row by row a function of (x, sigma, label)."""

    shape, sigma_min, sigma_max = (2,), 0.002, 80.0

    def __call__(self, x, sigma, labels=None):
        label = torch.full((len(x),), 2) if labels is None else labels
        return x / (1 + sigma.to(x).reshape(-1, 1)) + label[:, None]


def guided(labels, scale=3.0):
    network = Counted(Network())
    return network, ClassifierFree(Labelled(network, labels), Labelled(network, 2), scale)


@pytest.mark.parametrize("sigma", [SIGMA, torch.arange(1.0, 7.0, dtype=torch.float64)], ids=["one", "per sample"])
def test_one_network_is_asked_once_for_both_halves(sigma):
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    network, guide = guided(labels)
    x, plain = states(), Network()
    got = guide(x, sigma)
    free = plain(x, sigma)
    assert torch.equal(got, free + 3.0 * (plain(x, sigma, labels) - free))
    assert (network.calls, network.evaluations) == (1, 12)


def test_labels_follow_their_samples():
    labels, rows = torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([4, 0, 3])
    network, guide = guided(labels)
    x = states()
    part = take(Temperature(guide, 0.2), rows)
    assert torch.equal(part(x[rows], SIGMA), Temperature(guide, 0.2)(x, SIGMA)[rows])
    bare = Network()
    assert take(bare, rows) is bare
    whole = Temperature(Labelled(network, 1), 0.2)
    assert take(whole, rows) is whole  # one label for all needs no other binding


def test_each_sample_has_its_own_scale():
    conditional, free = pair()
    x, scales = states(), torch.tensor([0.0, 1.0, 2.0, -1.0, 5.0, 0.5], dtype=torch.float64)
    guided = ClassifierFree(conditional, free, scales)
    each = torch.cat([ClassifierFree(conditional, free, float(w))(x[i : i + 1], SIGMA) for i, w in enumerate(scales)])
    assert torch.allclose(guided(x, SIGMA), each, atol=1e-12)
    rows = torch.tensor([4, 2])
    assert torch.allclose(take(guided, rows)(x[rows], SIGMA), each[rows], atol=1e-12)
    with pytest.raises(FanalError, match="6 scales"):
        guided(x[:3], SIGMA)


def test_a_window_limits_it():
    conditional, free = pair()
    x = states()
    guided = ClassifierFree(conditional, free, 4.0, window=(0.5, 2.0))
    assert torch.equal(guided(x, SIGMA), ClassifierFree(conditional, free, 4.0)(x, SIGMA))
    calls = free.calls
    assert torch.equal(guided(x, SIGMA * 2), conditional(x, SIGMA * 2))
    assert free.calls == calls
    levels = torch.tensor([0.1, 0.6, 1.9, 2.1, 5.0, 0.5], dtype=torch.float64)
    mixed = guided(x, levels)
    for i, level in enumerate(levels):
        one = guided(x[i : i + 1], level)
        assert torch.allclose(mixed[i : i + 1], one, atol=1e-12)
    with pytest.raises(FanalError, match="window"):
        ClassifierFree(conditional, free, 4.0, window=(2.0, 1.0))


def two_classes():
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    return Mixture(means, [0.3, 0.7], std=0.6), Gaussian(means[0], 0.36)


def test_the_exact_classifier_gives_the_conditional_denoiser():
    """At scale 1: Bayes' rule. At scale w: classifier-free guidance with w, since both add the same score."""
    whole, part = two_classes()

    def log_probability(x, sigma):
        return whole.weights(x, sigma)[:, 0].log()

    x = states()
    assert torch.allclose(Classifier(whole, log_probability)(x, SIGMA), part(x, SIGMA), atol=1e-9)
    wanted = ClassifierFree(part, whole, 3.5)(x, SIGMA)
    assert torch.allclose(Classifier(whole, log_probability, 3.5)(x, SIGMA), wanted, atol=1e-9)
    assert torch.equal(Classifier(whole, log_probability, 0.0)(x, SIGMA), whole(x, SIGMA))
    outside = Classifier(whole, log_probability, 3.5, window=(0.0, 1.0))
    assert torch.equal(outside(x, SIGMA), whole(x, SIGMA))


def test_a_linear_reward_tilts_a_gaussian_exactly():
    """`p(x0)·exp(⟨a, x0⟩)` has mean `μ + Σ a` and the same covariance."""
    a = torch.tensor([0.7, -0.4], dtype=torch.float64)
    law = Gaussian(torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
    tilted = Gaussian(
        law.mean + torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double() @ a, torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    )
    x = states()
    assert torch.allclose(Reward(law, lambda d: d @ a)(x, SIGMA), tilted(x, SIGMA), atol=1e-9)


def test_a_measurement_of_a_gaussian_is_answered_exactly():
    """Against the closed form: conditioning a Gaussian on `y = A x0 + s n` leaves a Gaussian."""
    d, m, s = 6, 3, 0.2
    root = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cov, mean = root @ root.T + 0.1 * torch.eye(d), torch.arange(d, dtype=torch.float64)
    A = torch.randn(m, d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    gain = cov @ A.T @ torch.linalg.inv(A @ cov @ A.T + s**2 * torch.eye(m))
    posterior = Gaussian(mean + gain @ (y - A @ mean), cov - gain @ A @ cov)
    guided = Inverse(Gaussian(mean, cov), lambda x0: x0 @ A.T, y, s, iterations=20)
    x = noise((d,), range(5), 3.0, dtype=torch.float64)
    for sigma in (5.0, 1.7, 0.3):
        level = torch.tensor(sigma, dtype=torch.float64)
        assert torch.allclose(guided(x, level), posterior(x, level), atol=1e-7), sigma
    with torch.no_grad():
        end = fanal.sample(guided, 20 * x, polynomial(40), Heun())
    assert torch.allclose(end @ A.T, y.expand(5, -1), atol=4 * s)


def test_a_jacobian_that_is_no_covariance_does_not_blow_up():
    """Where conjugate gradients find no minimum they stop, and the prediction is left as it is."""
    guided = Inverse(lambda x, sigma: -x, lambda x0: x0, torch.ones(3), 0.1)  # pyright: ignore[reportArgumentType]
    x = noise((3,), range(4), 1.0)
    assert torch.equal(guided(x, torch.tensor(2.0)), -x)


def test_a_measurement_has_its_operators_shape():
    law = Gaussian(torch.zeros(2).double(), 1.0)
    for operator, y in ((lambda x0: x0.sum(1), torch.tensor([1.0])), (lambda x0: x0, torch.tensor(1.0))):
        with pytest.raises(FanalError, match=r"\(B, m\)"):
            Inverse(law, operator, y, 0.1)(states(), SIGMA)


def test_infinite_noise_outside_the_window_is_left_alone():
    law = Gaussian(torch.tensor([1.0, 2.0], dtype=torch.float64), 1.0)
    pushed = Reward(law, lambda d: d.sum(1), window=(0.1, 5.0))
    x, sigma = states()[:2], torch.tensor([math.inf, 1.0], dtype=torch.float64)
    assert torch.allclose(pushed(x, sigma)[0], law.mean)


def test_gradients_that_do_not_exist_are_told():
    whole, _ = two_classes()
    with pytest.raises(FanalError, match="differentiated"):
        Reward(whole, lambda denoised: denoised.detach().sum(1))(states(), SIGMA)
    with pytest.raises(FanalError, match="one number per sample"):
        Reward(whole, lambda denoised: denoised)(states(), SIGMA)
    with pytest.raises(FanalError, match="noise"):
        Inverse(whole, lambda x0: x0, torch.zeros(2), 0.0)


COV = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
MEAN, WAY = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([[0.7, -0.4]], dtype=torch.float64)
DERIVED = ("classifier", "reward", "inverse")


def gaussian_forms():
    """Form → guided Gaussian, and the Gaussian that it is."""
    law, told = Gaussian(MEAN, COV), Gaussian(2 * MEAN, COV)
    tilted, gain = Gaussian(MEAN + 3 * COV @ WAY[0], COV), COV @ WAY.T / (WAY @ COV @ WAY.T + 0.2**2)
    posterior = Gaussian(MEAN + gain @ (0.5 - WAY @ MEAN), COV - gain @ WAY @ COV)

    def log_probability(x, sigma):
        """Of N(2m, C + sigma² I) over N(m, C + sigma² I)."""
        inverse = torch.linalg.inv(COV + sigma.reshape(-1, 1, 1) ** 2 * torch.eye(2))
        ways = x - 2 * MEAN, x - MEAN
        far, near = (torch.einsum("bi,bij,bj->b", way, inverse.expand(len(x), 2, 2), way) / 2 for way in ways)
        return near - far

    return {
        "classifier-free": (ClassifierFree(told, law, 3.0), Gaussian(4 * MEAN, COV)),
        "classifier": (Classifier(law, log_probability, 3.0), Gaussian(4 * MEAN, COV)),
        "reward": (Reward(law, lambda x0: (x0 @ WAY.T)[:, 0], 3.0), tilted),
        "inverse": (Inverse(law, lambda x0: x0 @ WAY.T, torch.tensor([0.5]).double(), 0.2), posterior),
    }


def solver_for(name, form):
    """The solver, with the option that it needs to take this form, or none where there is no such option."""
    if form in DERIVED and name == "taylor2":
        return None
    return build_solver("rods:product=difference" if form in DERIVED and name == "rods" else name)


@pytest.mark.parametrize("form", ["classifier-free", *DERIVED])
@pytest.mark.parametrize("name", NAMED)
def test_every_solver_takes_guidance_as_the_law_that_it_makes(name, form):
    """Of a Gaussian each form makes another Gaussian; any solver runs to the same samples with either."""
    denoiser, law = gaussian_forms()[form]
    x, grid = 40 * states(), polynomial(8)
    solver = solver_for(name, form)
    if solver is None:
        with pytest.raises(FanalError, match="such as heun instead of taylor2"):
            fanal.sample(denoiser, x, grid, build_solver(name), range(6))
        return
    got, wanted = (fanal.sample(each, x, grid, solver, range(6)) for each in (denoiser, law))
    assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    path = tmp_path_factory.mktemp("plane") / "model"
    tiny(path, shape=(2,), classes=2)
    return fanal.load(str(path))


def network_form(form, network, scale, window=None):
    if form == "classifier-free":
        return ClassifierFree(Labelled(network, 1), network, scale, window)
    if form == "classifier":
        return Classifier(network, lambda x, sigma: -(1 + (x**2).sum(1)).log(), scale, window)
    if form == "reward":
        return Reward(network, lambda x0: -(x0**2).sum(1), scale, window)
    return Inverse(network, lambda x0: x0[:, :1], torch.tensor([0.5]), 0.5, 3, scale, window)


@pytest.mark.parametrize("form", ["classifier-free", *DERIVED])
@pytest.mark.parametrize("name", NAMED)
def test_every_solver_takes_guidance_of_a_network_with_scales_and_windows(plane, name, form):
    """A sample of scale 0 runs as without guidance beside one of scale 0.5, and outside the window all do."""
    x, grid, solver = noise((2,), range(2), 80.0), polynomial(6), solver_for(name, form)
    if solver is None:
        with pytest.raises(FanalError, match="such as heun instead of taylor2"):
            fanal.sample(network_form(form, plane, 0.5), x, grid, build_solver(name), range(2))
        return
    free = fanal.sample(plane, x, grid, solver, range(2))
    got = fanal.sample(network_form(form, plane, torch.tensor([0.0, 0.5])), x, grid, solver, range(2))
    assert torch.allclose(got[0], free[0], rtol=1e-3, atol=1e-3)
    assert float((got[1] - free[1]).abs().max()) > 1e-4
    if form in DERIVED:  # classifier-free guidance is D_c outside
        away = network_form(form, plane, 0.5, window=(100.0, 200.0))
        assert torch.equal(fanal.sample(away, x, grid, solver, range(2)), free)


@pytest.mark.parametrize("form", DERIVED)
def test_guidance_by_a_gradient_says_what_to_try_where_it_would_be_differentiated(form):
    denoiser, x = gaussian_forms()[form][0], states()
    for solver in ("rods", "rods:product=forward", "taylor2"):
        with pytest.raises(FanalError, match="rods with product=difference"):
            fanal.sample(denoiser, x, polynomial(8), build_solver(solver), range(6))
    with pytest.raises(FanalError, match="product=difference"):
        denoiser(x.requires_grad_(), SIGMA)


def test_measurements_have_scales_and_windows():
    """`D + w·(D_y − D)`: 1 is the posterior, 0 the denoiser at one call; per sample, and in a window of sigma."""
    law, posterior = Gaussian(MEAN, COV), gaussian_forms()["inverse"][1]
    asked, x, scales = Asked(law), states(), torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 3.0], dtype=torch.float64)

    def inverse(scale, window=None):
        return Inverse(asked, lambda x0: x0 @ WAY.T, torch.tensor([0.5]).double(), 0.2, scale=scale, window=window)

    free, step = law(x, SIGMA), posterior(x, SIGMA) - law(x, SIGMA)
    assert torch.allclose(inverse(scales)(x, SIGMA), free + scales[:, None] * step, atol=1e-9)
    rows = torch.tensor([5, 1])
    assert torch.allclose(take(inverse(scales), rows)(x[rows], SIGMA), (free + scales[:, None] * step)[rows], atol=1e-9)
    levels = torch.tensor([0.1, 0.6, math.inf, 2.1, 5.0, 0.5], dtype=torch.float64)
    mixed, inside = inverse(1.0, (0.5, 2.0))(x, levels), (levels >= 0.5) & (levels <= 2)
    assert torch.allclose(mixed, torch.where(inside[:, None], posterior(x, levels), law(x, levels)), atol=1e-9)
    asked.calls = 0
    assert torch.equal(inverse(0.0)(x, SIGMA), free)
    assert asked.calls == 1
    with pytest.raises(FanalError, match="window"):
        inverse(1.0, (2.0, 1.0))
    with pytest.raises(FanalError, match="6 scales"):
        inverse(scales)(x[:2], SIGMA)
    with pytest.raises(FanalError, match="differentiated"):
        Inverse(law, lambda x0: x0.detach() @ WAY.T, torch.tensor([0.5]).double(), 0.2)(x, SIGMA)
