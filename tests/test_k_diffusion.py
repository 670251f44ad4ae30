"""k-diffusion's signatures: its samplers' recorded figures, its contract with models and callbacks, the way back."""

import json
from pathlib import Path

import pytest
import torch

import fanal
from fanal.adapters.k_diffusion import from_k_diffusion, sampler
from fanal.config import build_solver
from fanal.denoiser import Counted
from fanal.errors import FanalError, NonFiniteError
from fanal.exact import Mixture
from fanal.solvers import SOLVERS, Ancestral, Churn, Euler, Heun

F64 = torch.float64
PEERS = json.loads((Path(__file__).parent / "figures" / "peers_mixture2d.json").read_text())


class Model:
    """A model as k-diffusion wraps them: called with x, one sigma per sample and the extra arguments."""

    def __init__(self, process="ve", dtype=F64):
        self.truth = Mixture(torch.tensor(PEERS["means"], dtype=F64), PEERS["weights"], std=PEERS["std"])
        self.mean = (torch.tensor(PEERS["weights"], dtype=F64)[:, None] * torch.tensor(PEERS["means"], dtype=F64)).sum(
            0
        )
        self.process, self.dtype, self.asked = process, dtype, []

    def __call__(self, x, sigma, *, cond, scale=1.0):
        assert cond == "a cat"
        assert sigma.shape == (len(x),)
        assert sigma.dtype == x.dtype == self.dtype
        self.asked.append(sigma)
        level = sigma.double()
        if self.process == "ve":
            return self.truth(x, level).to(x.dtype)
        denoised = torch.zeros_like(x)  # of z = (1 − t)·x0 + t·n; at t = 1 the mean of the data
        far = sigma == 1
        denoised[far] = self.mean.to(x.dtype)
        near, t = ~far, level[~far]
        denoised[near] = self.truth(x[near] / (1 - t[:, None]), t / (1 - t)).to(x.dtype)
        return denoised


EXTRA = {"cond": "a cat", "scale": 2.0}


def ours(case):
    """Our solver for a recorded run of k-diffusion; None where there is none yet."""
    name, options = case["sampler"], case["options"]
    texts = {
        "euler": "euler",
        "heun": "heun",
        "dpm_2": "dpm2",
        "dpmpp_2m": "dpmpp:order=2,lower_final=never",
        "dpmpp_2s_ancestral": "dpmpp2s",
    }
    text = texts.get(name, "")
    if text.partition(":")[0] not in SOLVERS:
        return None
    assert options in ({}, {"eta": 0.0})
    return build_solver(text)


RECORDED = [(c, solver) for c in PEERS["cases"] if c["peer"] == "k-diffusion" and (solver := ours(c))]


@pytest.mark.parametrize(("case", "solver"), RECORDED, ids=[c["sampler"] for c, _ in RECORDED])
def test_recorded_figures_of_its_samplers(case, solver):
    """To 1e-10 of the largest entry, and with as many calls of the model."""
    model, sigmas = Model(), torch.tensor(case["sigmas"], dtype=F64)
    x = torch.tensor(PEERS["z"], dtype=F64) * sigmas[0]
    end, want = sampler(solver)(model, x, sigmas, EXTRA), torch.tensor(case["final"], dtype=F64)
    assert float((end - want).abs().max()) <= 1e-10 * float(want.abs().max())
    assert len(model.asked) == case["calls"]


def test_at_least_euler_and_heun_are_recorded():
    assert {"euler", "heun"} <= {case["sampler"] for case, _ in RECORDED}


def start(sigma, dtype=F64):
    return fanal.noise((2,), range(5), float(sigma), dtype=dtype)


@pytest.mark.parametrize("solver", [Euler(), Heun(), Churn(s_max=1e9), Ancestral()], ids=lambda s: type(s).__name__)
def test_the_callback_sees_every_interval(solver):
    """The keys that k-diffusion's samplers give, with the values that its own Euler and Heun would give."""
    model, sigmas, seen = Model(), fanal.schedules.polynomial(6), []
    end = sampler(solver, seeds=range(5))(model, start(80), sigmas, EXTRA, callback=seen.append)
    want = list(fanal.trace(model.truth, start(80), sigmas, solver, range(5)))
    assert torch.equal(end, want[-1].step.x_next)
    assert [set(one) for one in seen] == [{"x", "i", "sigma", "sigma_hat", "denoised"}] * 6
    for i, (one, transition) in enumerate(zip(seen, want, strict=True)):
        x, sigma_hat = transition.step.at or (transition.x, transition.span.sigma)
        assert one["i"] == i
        assert float(one["sigma"]) == float(sigmas[i])
        assert float(one["sigma_hat"]) == float(sigma_hat)
        assert torch.equal(one["x"], x)
        assert torch.equal(one["denoised"], transition.step.denoised)
        assert torch.equal(model.truth(one["x"], one["sigma_hat"]), one["denoised"])


def test_a_callback_can_stop_it():
    class Halt(Exception):
        pass

    def callback(given):
        if given["i"] == 2:
            raise Halt

    model = Model()
    with pytest.raises(Halt):
        sampler(Euler())(model, start(80), fanal.schedules.polynomial(6), EXTRA, callback)
    assert len(model.asked) == 3


def test_a_float32_model_gets_float32():
    model, sigmas = Model(dtype=torch.float32), fanal.schedules.polynomial(6).float()
    end = sampler(Heun())(model, start(80, torch.float32), sigmas, EXTRA, None, True)
    want = fanal.sample(model.truth, start(80), fanal.schedules.polynomial(6), Heun())
    assert end.dtype == torch.float32
    torch.testing.assert_close(end.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("solver", [Euler(), Heun(), Ancestral()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("ends", [(1.0, 0.0), (0.95, 0.05)])
def test_flow_models_mean_z_and_t(solver, ends):
    """Between t and z outside and sigma and x inside: a run in x-space, from infinity where t begins at 1."""
    model, t = Model("flow"), torch.linspace(*ends, 7, dtype=F64)
    seen = []
    z = start(1)
    end = sampler(solver, seeds=range(5), process="flow")(model, z, t, EXTRA, seen.append)

    def truth(x, sigma):
        if torch.isinf(sigma):
            return model.mean.expand_as(x)
        return model.truth(x, sigma)

    x = z if ends[0] == 1 else z / (1 - t[0])
    want = fanal.sample(truth, x, t / (1 - t), solver, range(5))
    torch.testing.assert_close(end, want * (1 - t[-1]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.stack([one["sigma_hat"] for one in seen]), t[:-1])
    torch.testing.assert_close(seen[0]["x"], z)


def test_euler_on_a_flow_model_is_eulers_method_in_t():
    """z' = z + (t' − t)·(z − D)/t, as ComfyUI's own Euler computes it."""
    model, t = Model("flow"), torch.linspace(1, 0, 9, dtype=F64)
    end, z = sampler(Euler(), process="flow")(model, start(1), t, EXTRA), start(1)
    for here, there in zip(t, t[1:], strict=False):
        z = z + (there - here) * (z - model(z, here.expand(5), **EXTRA)) / here
    torch.testing.assert_close(end, z, rtol=1e-10, atol=1e-10)


def test_a_model_becomes_a_denoiser():
    model = Model()
    D = Counted(from_k_diffusion(model, EXTRA))
    x, sigma = start(3), torch.tensor(3.0, dtype=F64)
    assert torch.equal(D(x, sigma), model.truth(x, sigma))
    each = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1], dtype=F64)
    assert torch.equal(D(x, each), model.truth(x, each))
    end = fanal.sample(D, start(80), fanal.schedules.polynomial(8), Heun())
    assert torch.equal(end, fanal.sample(model.truth, start(80), fanal.schedules.polynomial(8), Heun()))
    flow = from_k_diffusion(Model("flow"), EXTRA, process="flow")
    torch.testing.assert_close(flow(x, sigma), model.truth(x, sigma))


def test_grids_that_are_none():
    model, x = Model(), start(80)
    assert sampler(Euler())(model, x, torch.tensor([80.0], dtype=F64), EXTRA) is x  # as k-diffusion: nothing to do
    assert sampler(Euler())(model, x, torch.tensor([]), EXTRA) is x
    with pytest.raises(FanalError, match="strictly monotone"):
        sampler(Euler())(model, x, torch.tensor([80.0, 3.0, 3.0, 0.0]), EXTRA)
    with pytest.raises(FanalError, match=r"times of a flow model lie in \[0, 1\], got 0 to 14.6"):
        sampler(Euler(), process="flow")(model, x, torch.tensor([14.6, 1.0, 0.0]), EXTRA)
    with pytest.raises(FanalError, match="needs seeds"):
        sampler(Ancestral())(model, x, fanal.schedules.polynomial(3), EXTRA)
    with pytest.raises(NonFiniteError):
        sampler(Euler())(lambda x, sigma: x * torch.nan, x, fanal.schedules.polynomial(3))


def test_a_bar_is_shown_on_request_only(capsys):
    run = sampler(Euler())
    for disable, shown in ((True, False), (None, False), (False, True)):  # None: not without a terminal
        run(Model(), start(80), fanal.schedules.polynomial(4), EXTRA, None, disable)
        assert bool(capsys.readouterr().err.strip()) is shown
