"""The same numbers at the same number of calls as other programs: diffusers live, the others by recorded figures."""

import json
from pathlib import Path

import pytest
import torch

from fanal.denoiser import Counted
from fanal.exact import Mixture
from fanal.sampling import sample
from fanal.schedules import from_timesteps, polynomial
from fanal.solvers import AFS, DDPM, DEIS, DPM2, IPNDM, LMS, Ancestral, Churn, DPMpp, DPMpp2S, Euler, Heun, UniPC
from peers import SEEDS, begin, drive_times, drive_ve, fresh
from problems import mixture

F64 = torch.float64
PEERS = json.loads((Path(__file__).parent / "figures" / "peers_mixture2d.json").read_text())


LOWER = {True: "always", False: "never"}

OURS = {
    "euler": lambda o: Euler(),
    "heun": lambda o: Heun(),
    "edm_sampler": lambda o: Heun(),
    "dpm2": lambda o: DPM2(o.get("r", 0.5)),
    "dpm_2": lambda o: DPM2(),
    "ipndm": lambda o: IPNDM(o["max_order"]),
    "deis_tab": lambda o: DEIS(o["max_order"], points=10_000),
    "dpmpp": lambda o: DPMpp(o["max_order"], lower_final=LOWER[o["lower_order_final"]]),
    "unipc": lambda o: UniPC(o["max_order"], o["variant"], LOWER[o["lower_order_final"]]),
    "dpmpp_2m": lambda o: DPMpp(2, lower_final="never"),
    "lms": lambda o: LMS(o["order"], finish=False),
    "dpmpp_2s_ancestral": lambda o: DPMpp2S(),
    "dpmpp_3m_sde": lambda o: DPMpp(3, "taylor", "never"),
}
"""The peers' samplers, with the options of the recorded runs, in our fields."""


def ours(name, case):
    """Our grid and solver for a recorded run."""
    solver = OURS[name](case["options"])
    if case["options"].get("afs"):
        solver = AFS(solver)
    return case["sigmas"] + [0.0] * case["options"].get("denoise_to_zero", False), solver


RECORDED = [(case, *ours(case["sampler"], case)) for case in PEERS["cases"]]


def test_the_recorded_figures_are_those_we_mean():
    """All 37, and every option of theirs is understood."""
    assert len(RECORDED) == 37
    known = {"afs", "denoise_to_zero", "r", "max_order", "lower_order_final", "variant", "order", "eta"}
    for case, _, _ in RECORDED:
        assert {k for k, v in case["options"].items() if (k, v) not in (("predict_x0", True), ("thr", "off"))} <= known
        assert case["options"].get("eta", 0.0) == 0.0


@pytest.mark.parametrize(
    ("case", "sigmas", "solver"),
    RECORDED,
    ids=[f"{c['peer']}-{c['sampler']}-{'-'.join(map(str, c['options'].values()))}" for c, _, _ in RECORDED],
)
def test_recorded_figures_of_peers(case, sigmas, solver):
    """To 1e-10 of the largest entry, and with as many network calls."""
    D = Counted(Mixture(torch.tensor(PEERS["means"], dtype=F64), PEERS["weights"], std=PEERS["std"]))
    x = torch.tensor(PEERS["z"], dtype=F64) * case["sigmas"][0]
    end = sample(D, x, sigmas, solver)
    want = torch.tensor(case["final"], dtype=F64)
    assert float((end - want).abs().max()) <= 1e-10 * float(want.abs().max())
    assert D.calls == case["calls"]


def test_peers_use_our_grids():
    by_peer = {case["peer"]: torch.tensor(case["sigmas"], dtype=F64) for case, _, _ in RECORDED}
    torch.testing.assert_close(by_peer["k-diffusion"], polynomial(8), rtol=1e-12, atol=0)
    torch.testing.assert_close(by_peer["edm"], polynomial(8), rtol=1e-12, atol=0)
    torch.testing.assert_close(by_peer["diff-sampler"], polynomial(8, zero=False), rtol=1e-12, atol=0)


# diffusers, live. Its schedulers keep tables in float32; where they only read them, the tests hand them the same
# numbers in float64, so that the formulas are compared and not the rounding.


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("steps", [5, 18])
def test_diffusers_heun(diffusers, steps):
    """In float64, 2N − 1 calls; its Karras grid is ours between its own ends."""
    scheduler = diffusers.HeunDiscreteScheduler(prediction_type="sample", use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    train = ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()).sqrt()
    given = scheduler.sigmas[[0, *range(1, 2 * steps, 2)]].double()
    grid = polynomial(steps, float(given[-2]), float(given[0]))
    torch.testing.assert_close(grid, given, rtol=1e-6, atol=0)
    assert float(given[0]) == pytest.approx(float(train[-1]), rel=1e-5)
    scheduler.sigmas = torch.cat([grid[:1], grid[1:-1].repeat_interleave(2), grid[-1:]])
    theirs, mine = Counted(mixture()), Counted(mixture())
    want = drive_ve(scheduler, theirs, begin(grid[0]), "sample")
    got = sample(mine, begin(grid[0]), grid, Heun())
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert mine.calls == theirs.calls == 2 * steps - 1


def float32_euler(scheduler, steps, **options):
    """diffusers' Euler casts the sample to float32 at every step: agreement is to float32 rounding."""
    grid = polynomial(steps)
    scheduler.set_timesteps(sigmas=grid.tolist())
    torch.testing.assert_close(scheduler.sigmas.double(), grid, rtol=1e-6, atol=0)
    D = Counted(mixture())
    return D, drive_ve(scheduler, D, begin(80.0).float(), "sample", **options), grid


@pytest.mark.parametrize("steps", [5, 18])
def test_diffusers_euler(diffusers, steps):
    theirs, want, grid = float32_euler(diffusers.EulerDiscreteScheduler(prediction_type="sample"), steps)
    mine = Counted(mixture())
    got = sample(mine, begin(80.0).float().double(), grid, Euler())
    torch.testing.assert_close(got, want.double(), rtol=0, atol=2e-5)
    assert mine.calls == theirs.calls == steps


def test_diffusers_euler_churn(diffusers, monkeypatch):
    """Its churn is ours around Euler, when both see the same noise."""
    from diffusers.schedulers import scheduling_euler_discrete as module

    churn = Churn(Euler(), s_churn=6.0, s_min=0.05, s_max=50.0, s_noise=1.003)
    inside = [i for i, s in enumerate(polynomial(18).tolist()) if 0.05 <= s <= 50.0]
    drawn = iter(inside)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: fresh(next(drawn), "churn").float())
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="sample")
    grid = polynomial(18)
    scheduler.set_timesteps(sigmas=grid.tolist())
    D, x = mixture(), begin(80.0).float()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(x, t) * (scheduler.sigmas[i] ** 2 + 1).sqrt()
        # The scheduler churns after the model was called; feed it the prediction at the churned point instead.
        sigma = grid[i] * (1 + min(6.0 / 18, 2**0.5 - 1)) if i in inside else grid[i]
        extra = (sigma**2 - grid[i] ** 2).sqrt() * 1.003 * fresh(i, "churn") if i in inside else 0.0
        denoised = D(x.double() + extra, sigma).float()
        x = scheduler.step(denoised, t, x, s_churn=6.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003).prev_sample
    got = sample(D, begin(80.0).float().double(), grid, churn, SEEDS)
    torch.testing.assert_close(got, x.double(), rtol=0, atol=3e-5)
    assert next(drawn, None) is None


def test_diffusers_euler_ancestral(diffusers, monkeypatch):
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as module

    scheduler = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(20)
    grid = from_timesteps(scheduler.timesteps.long(), scheduler.alphas_cumprod)
    torch.testing.assert_close(scheduler.sigmas.double(), grid, rtol=1e-5, atol=0)
    drawn = iter(range(20))
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: fresh(next(drawn)))
    scheduler.sigmas = grid
    theirs, mine = Counted(mixture()), Counted(mixture())
    x = begin(grid[0]).float().double()
    want = drive_ve(scheduler, theirs, x, "epsilon")
    got = sample(mine, x, grid, Ancestral(), SEEDS)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert mine.calls == theirs.calls == 20


def vp(scheduler, steps):
    """A VP scheduler with its tables in float64, and the grid of its timesteps in x-space."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    return scheduler, from_timesteps(scheduler.timesteps, scheduler.alphas_cumprod)


@pytest.mark.parametrize("prediction", ["sample", "epsilon"])
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_diffusers_ddim(diffusers, eta, steps, prediction):
    """eta 0 is Euler, any other eta ancestral Euler, in float64 with our noise handed to both."""
    scheduler, grid = vp(diffusers.DDIMScheduler(clip_sample=False, prediction_type=prediction), steps)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=F64)

    def step(i, output, t, z):
        return scheduler.step(output, t, z, eta=eta, variance_noise=fresh(i) if eta else None)

    theirs, mine = Counted(mixture()), Counted(mixture())
    want = drive_times(scheduler, theirs, begin(grid[0]), grid, prediction, step)
    got = sample(mine, begin(grid[0]), grid, Euler() if eta == 0 else Ancestral(eta=eta), SEEDS)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert mine.calls == theirs.calls == steps


@pytest.mark.parametrize("steps", [10, 50])
def test_diffusers_ddpm(diffusers, steps, monkeypatch):
    """The posterior of the forward process ("fixed_small" variance), in float64 with our noise handed to both."""
    from diffusers.schedulers import scheduling_ddpm as module

    scheduler, grid = vp(diffusers.DDPMScheduler(clip_sample=False, prediction_type="sample"), steps)
    scheduler.one = torch.tensor(1.0, dtype=F64)
    drawn = iter(range(steps))
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: fresh(next(drawn)))
    theirs, mine = Counted(mixture()), Counted(mixture())
    want = drive_times(
        scheduler, theirs, begin(grid[0]), grid, "sample", lambda i, output, t, z: scheduler.step(output, t, z)
    )
    got = sample(mine, begin(grid[0]), grid, DDPM(), SEEDS)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert mine.calls == theirs.calls == steps
    assert list(drawn) == [steps - 1]  # neither draws into 0


def test_float32_runs_agree_with_the_recorded_figures_too():
    """What users run: within float32 rounding of the recorded float64 figure."""
    case, sigmas, solver = next(r for r in RECORDED if r[0]["peer"] == "edm")
    D = Mixture(torch.tensor(PEERS["means"], dtype=F64), PEERS["weights"], std=PEERS["std"])
    x = (torch.tensor(PEERS["z"], dtype=F64) * 80.0).float()
    end = sample(D, x, sigmas, solver)
    assert end.dtype == torch.float32
    torch.testing.assert_close(end.double(), torch.tensor(case["final"], dtype=F64), rtol=0, atol=2e-5)
