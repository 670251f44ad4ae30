"""Guards in ComfyUI: guarded and redrawing samplers, samplers that are watched, flagged latents apart."""

import json
import sys
import types

import pytest
import torch

import fanal
from fanal.adapters import comfyui
from fanal.adapters.comfyui_guard import FanalFlag, FanalGuard, FanalRedraw, FanalWatch
from fanal.calibration_files import Saved, write_calibration
from fanal.errors import FanalError
from fanal.hallucination import Renoise, Variance, watch
from fanal.hallucination.calibration import settle
from fanal.hallucination.detectors import build, last_window
from fanal.hallucination.rods import Guard
from fanal.solvers import Churn, Euler, Heun
from problems import mixture
from test_comfyui import CONST, EPS, FLOW, KSAMPLER, SD, Guider, Masked, comfy  # noqa: F401

GRID = fanal.schedules.polynomial(8, 0.03, 14.614642)


@pytest.fixture(autouse=True)
def blocker(monkeypatch):
    """ComfyUI's sign that nothing comes out."""

    class ExecutionBlocker:
        def __init__(self, message):
            self.message = message

    package, graph = types.ModuleType("comfy_execution"), types.ModuleType("comfy_execution.graph")
    package.__path__, graph.ExecutionBlocker = [], ExecutionBlocker
    monkeypatch.setitem(sys.modules, "comfy_execution", package)
    monkeypatch.setitem(sys.modules, "comfy_execution.graph", graph)
    return ExecutionBlocker


def start(count=6, seed=7):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def run(node, sampling, noise, seed=7, sigmas=None):
    """What SamplerCustom does with a SAMPLER."""
    guider, shown = Guider(sampling), []
    (own,) = comfyui.FanalSigmas().build("polynomial", "", 8, 14.614642, 0.03, True, SD)
    end = node.sample(
        guider,
        own if sigmas is None else sigmas,
        {"model_options": {}, "seed": seed},
        lambda *given: shown.append(given),
        noise,
        torch.zeros_like(noise),
        disable_pbar=True,
    )
    return end, guider, shown


def x_of(noise):
    return noise.double() * (1 + GRID[0] ** 2).sqrt()


def sigmas():
    (own,) = comfyui.FanalSigmas().build("polynomial", "", 8, 14.614642, 0.03, True, SD)
    return own.double()


@pytest.mark.parametrize(("method", "threshold"), [("cas", 0.0), ("cas", 0.02), ("sas", 0.0), ("random", 0.0)])
@pytest.mark.parametrize("product", ["difference", "backward"])
def test_a_guarded_sampler_is_the_guard(method, threshold, product):
    (node,) = FanalGuard().build("heun", "", method, 0.1, 5.0, 0.3, threshold, product)
    end, guider, _ = run(node, EPS(), start())
    solver = Guard(
        Heun(), method, rho=0.1, window=(0.3, 5.0), window_units="sigma", threshold=threshold or None, product=product
    )
    D = fanal.Counted(mixture())
    want = fanal.sample(D, x_of(start()), sigmas(), solver, range(7, 13))
    assert len(guider.asked) == D.calls
    plain = fanal.sample(mixture(), x_of(start()), sigmas(), Heun())
    error, effect = float((end.double() - want).norm()), float((want - plain).norm())
    assert error < 0.02 * effect  # float32 on the one side, float64 on the other


def test_a_threshold_that_nobody_reaches_changes_no_bit():
    (guarded,) = FanalGuard().build("euler", "", "cas", 0.1, 5.0, 0.3, 1e9, "backward")
    (plain,) = comfyui.FanalSampler().build("euler", "")
    assert torch.equal(run(guarded, EPS(), start())[0], run(plain, EPS(), start())[0])


def test_wrong_widgets_are_told():
    assert "did you mean 's_churn'" in FanalGuard.VALIDATE_INPUTS("churn", "s_chrn=20")
    assert FanalGuard.VALIDATE_INPUTS("churn", "s_churn=20") is True
    with pytest.raises(FanalError, match="low <= high"):
        FanalGuard().build("euler", "", "cas", 0.1, 0.3, 5.0, 0.0, "difference")
    with pytest.raises(FanalError, match="threshold above 0, or a calibration"):
        FanalRedraw().build("euler", "", "variance", "", 0.0, 4.0, 2)


@pytest.mark.parametrize("solver", [Euler(), Heun(), Churn(s_max=1e9)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("detector", ["variance", "last_slope", "path_length"])
def test_a_watched_sampler_sees_what_a_detector_sees(solver, detector):
    """No bit and no call of the run changes; the risk is that of the same run in fanal."""
    name = type(solver).__name__.lower()
    (plain,) = comfyui.FanalSampler().build(name, "s_max=1e9" if name == "churn" else "")
    node, handle = FanalWatch().build(plain, detector, "")
    end, guider, shown = run(node, EPS(), start())
    bare, other, _ = run(plain, EPS(), start())
    assert torch.equal(end, bare)
    assert len(guider.asked) == len(other.asked)
    assert len(shown) == 8
    eye = build(detector, last_window(sigmas()))
    want = watch(mixture(), x_of(start()), sigmas(), solver, eye, range(7, 13))
    torch.testing.assert_close(handle.risk(), want.risk, rtol=2e-3, atol=1e-6)


def test_flow_models_are_watched_in_x_space():
    (grid,) = comfyui.FanalSigmas().build("logsnr", "", 8, 30.0, 0.02, True, FLOW)
    (plain,) = comfyui.FanalSampler().build("euler", "")
    node, handle = FanalWatch().build(plain, "variance", "")
    run(node, CONST(), start(), sigmas=grid)
    t = grid.double()
    levels = t / (1 - t)

    def truth(x, sigma):
        return torch.zeros_like(x) if torch.isinf(sigma) else mixture()(x, sigma)

    want = watch(truth, start().double(), levels, Euler(), Variance(last_window(levels)), range(7, 13))
    torch.testing.assert_close(handle.risk(), want.risk, rtol=2e-3, atol=1e-6)


def foreign(model, x, sigmas, extra_args=None, callback=None, disable=None, strength=1.0):
    """A sampler that is not fanal's: Euler as k-diffusion would write it, with an option of its own."""
    assert strength == 2.0
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def test_samplers_that_are_not_fanals_are_watched_too():
    node, handle = FanalWatch().build(KSAMPLER(foreign, {"strength": 2.0}, {}), "path_length", "")
    with pytest.raises(FanalError, match="has seen no run"):
        handle.risk()
    run(node, EPS(), start())
    want = watch(mixture(), x_of(start()), sigmas(), Euler(), build("path_length", last_window(sigmas())), range(7, 13))
    torch.testing.assert_close(handle.risk(), want.risk, rtol=2e-3, atol=1e-6)
    with pytest.raises(FanalError, match="k-diffusion's interface"):
        FanalWatch().build(object(), "variance", "")


def calibrated(tmp_path, grid=None, flag=0.5):
    """A calibration file for the mixture, as fanal guard --save leaves one."""
    grid = sigmas() if grid is None else grid
    eye = Variance(last_window(grid))
    seen = watch(mixture(), fanal.noise((2,), range(64), float(grid[0])).double(), grid, Euler(), eye, range(64))
    found = settle(eye, seen.risk, solver_name="euler", sigmas=grid, first_seed=0, flag=flag)
    path = tmp_path / "calibration.json"
    write_calibration(path, Saved("mixture", "", found))
    return str(path), found


def test_flagged_latents_come_out_apart(tmp_path, blocker):
    file, found = calibrated(tmp_path)
    (plain,) = comfyui.FanalSampler().build("euler", "")
    node, handle = FanalWatch().build(plain, "last_slope", file)  # the file's detector wins
    end, _, _ = run(node, EPS(), start())
    latent = {"samples": end, "noise_mask": torch.ones(1, 1, 2, 2), "batch_index": list(range(6))}
    kept, flagged, risk = FanalFlag().split(latent, handle, 0.0)
    values = torch.tensor(json.loads(risk), dtype=torch.float64)
    over = values > found.threshold
    assert 0 < int(over.sum()) < 6
    assert torch.equal(kept["samples"], end[~over])
    assert torch.equal(flagged["samples"], end[over])
    assert flagged["batch_index"] == over.nonzero().flatten().tolist()
    assert flagged["noise_mask"].shape == (1, 1, 2, 2)
    kept, flagged, _ = FanalFlag().split(latent, handle, 1e9)
    assert torch.equal(kept["samples"], end)
    assert isinstance(flagged, blocker)
    with pytest.raises(FanalError, match="the watch saw 6 latents, and here are 2"):
        FanalFlag().split({"samples": end[:2]}, handle, 0.0)
    other, handle = FanalWatch().build(plain, "variance", calibrated(tmp_path, fanal.schedules.polynomial(5))[0])
    with pytest.raises(FanalError, match="calibrated on 5 steps from sigma 80, and sampled on 8"):
        run(other, EPS(), start())
    assert FanalWatch.IS_CHANGED(plain, "variance", file) != FanalWatch.IS_CHANGED(plain, "variance", "")


def test_flagged_latents_are_drawn_again(tmp_path):
    """As the repair of the library, on the same seeds; unflagged latents keep every bit."""
    file, found = calibrated(tmp_path)
    node, handle = FanalRedraw().build("euler", "", "variance", file, 0.0, 3.0, 2)
    end, guider, shown = run(node, EPS(), start())
    eye, seeds, D = found.build(), range(7, 13), fanal.Counted(mixture())
    first = watch(D, x_of(start()), sigmas(), Euler(), eye, seeds)
    want = Renoise(3.0, 2).repair(D, x_of(start()), sigmas(), Euler(), eye, seeds, first, found.threshold)
    torch.testing.assert_close(end.double(), want.x, rtol=0, atol=2e-3)
    torch.testing.assert_close(handle.risk(), want.risk, rtol=2e-2, atol=1e-5)
    assert len(guider.asked) == D.calls
    assert len(shown) == 8
    (plain,) = comfyui.FanalSampler().build("euler", "")
    bare = run(plain, EPS(), start())[0]
    flagged = first.risk > found.threshold
    assert torch.equal(end[~flagged], bare[~flagged])
    assert not torch.equal(end[flagged], bare[flagged])
    never, _ = FanalRedraw().build("euler", "", "variance", "", 1e9, 3.0, 2)
    assert torch.equal(run(never, EPS(), start())[0], bare)


def test_masks_are_refused_by_the_redrawing_sampler():
    node, _ = FanalRedraw().build("euler", "", "variance", "", 1.0, 3.0, 2)
    with pytest.raises(FanalError, match="masked latent"):
        node.sampler_function(
            Masked(Guider(EPS()), sigmas()), start(), sigmas(), {"denoise_mask": torch.ones(1), "seed": 1}
        )
