"""Nodes in ComfyUI: against a stand-in that calls samplers as ComfyUI's KSAMPLER does, for both kinds of model."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

import fanal
from fanal.adapters import comfyui
from fanal.errors import FanalError
from fanal.schedules import SCHEDULES
from fanal.solvers import SOLVERS, Ancestral, Churn, Euler, Heun
from problems import mixture

F64 = torch.float64
SD, FLOW = comfyui.INPUT_KINDS
ROOT = Path(__file__).parent.parent


class EPS:
    """How models that predict noise are scaled: latents in x-space."""

    sigma_max = torch.tensor(14.614642)

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return noise * ((1 + sigma**2) ** 0.5 if max_denoise else sigma) + latent

    def inverse_noise_scaling(self, sigma, latent):
        return latent

    def denoised(self, z, sigma):
        return mixture()(z, sigma)


class CONST:
    """How flow-matching models are scaled: sigma is t, latents are (1 − t)·x0 + t·n."""

    sigma_max = torch.tensor(1.0)

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return sigma * noise + (1 - sigma) * latent

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1 - sigma)

    def denoised(self, z, t):
        if bool((t == 1).all()):
            return torch.zeros_like(z)  # the mean of this data
        return mixture()(z / (1 - t[:, None]), t / (1 - t))


class Guider:
    """What KSAMPLER calls `model_wrap`."""

    def __init__(self, sampling):
        self.inner_model, self.asked = types.SimpleNamespace(model_sampling=sampling), []

    def __call__(self, x, sigma, model_options, seed):
        assert sigma.shape == (len(x),)
        assert sigma.dtype == x.dtype == torch.float32
        self.asked.append(sigma)
        return self.inner_model.model_sampling.denoised(x.double(), sigma.double()).float()


class Masked:
    """What a sampler gets as `model`: one wrapper more, which also takes the mask."""

    def __init__(self, guider, sigmas):
        self.inner_model, self.sigmas = guider, sigmas

    def __call__(self, x, sigma, denoise_mask, model_options, seed):
        assert denoise_mask is None
        return self.inner_model(x, sigma, model_options, seed)


class KSAMPLER:
    """The interface of ComfyUI's: a sampler's function, its options, and how it is called."""

    def __init__(self, sampler_function, extra_options, inpaint_options):
        self.sampler_function, self.extra_options, self.inpaint_options = (
            sampler_function,
            extra_options,
            inpaint_options,
        )

    def sample(self, wrap, sigmas, extra_args, callback, noise, latent, denoise_mask=None, disable_pbar=False):
        sampling = wrap.inner_model.model_sampling
        full = bool(torch.isclose(sampling.sigma_max, sigmas[0])) or bool(sigmas[0] > sampling.sigma_max)
        x = sampling.noise_scaling(sigmas[0], noise, latent, full)
        end = self.sampler_function(
            Masked(wrap, sigmas),
            x,
            sigmas,
            extra_args={**extra_args, "denoise_mask": denoise_mask},
            callback=lambda one: callback(one["i"], one["denoised"], one["x"], len(sigmas) - 1),
            disable=disable_pbar,
            **self.extra_options,
        )
        return sampling.inverse_noise_scaling(sigmas[-1], end)


@pytest.fixture(autouse=True)
def comfy(monkeypatch):
    """A package `comfy` with the two names that the nodes import."""
    package = types.ModuleType("comfy")
    package.__path__ = []
    samplers, sampling = types.ModuleType("comfy.samplers"), types.ModuleType("comfy.model_sampling")
    samplers.KSAMPLER, sampling.CONST = KSAMPLER, CONST
    for name, module in (("comfy", package), ("comfy.samplers", samplers), ("comfy.model_sampling", sampling)):
        monkeypatch.setitem(sys.modules, name, module)


def sample(sampling, solver, options, sigmas, seed=7, latent=0.0):
    """A workflow: the sampler node's output, run as SamplerCustom does."""
    (node,) = comfyui.FanalSampler().build(solver, options)
    guider, shown = Guider(sampling), []
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed))
    end = node.sample(
        guider,
        sigmas,
        {"model_options": {}, "seed": seed},
        lambda *given: shown.append(given),
        noise,
        torch.full_like(noise, latent),
        disable_pbar=True,
    )
    return end, noise, guider, shown


CASES = [
    ("euler", "", Euler()),
    ("heun", "", Heun()),
    ("churn", "s_churn=20.0,solver=euler", Churn(Euler(), s_churn=20.0)),
    ("ancestral", "eta=0.5", Ancestral(eta=0.5)),
]


@pytest.mark.parametrize(("name", "options", "solver"), CASES, ids=[c[0] for c in CASES])
def test_a_solver_on_a_model_that_predicts_noise(name, options, solver):
    (sigmas,) = comfyui.FanalSigmas().build("polynomial", "rho=5", 8, 14.614642, 0.03, True, SD)
    end, noise, guider, shown = sample(EPS(), name, options, sigmas)
    grid = fanal.schedules.polynomial(8, 0.03, 14.614642, rho=5)
    torch.testing.assert_close(sigmas.double(), grid, rtol=1e-6, atol=0)
    x = noise.double() * (1 + grid[0] ** 2).sqrt()
    D = fanal.Counted(mixture())
    want = list(fanal.trace(D, x, sigmas.double(), solver, range(7, 10)))
    torch.testing.assert_close(end.double(), want[-1].step.x_next, rtol=0, atol=5e-5)
    assert len(guider.asked) == D.calls
    assert [(i, total) for i, _, _, total in shown] == [(i, 8) for i in range(8)]  # the progress bar and the preview
    torch.testing.assert_close(shown[-1][1].double(), want[-1].step.denoised, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("name", "options", "solver"), CASES, ids=[c[0] for c in CASES])
@pytest.mark.parametrize("zero", [True, False])
def test_a_solver_on_a_flow_model(name, options, solver, zero):
    """In x-space from infinity, whatever ComfyUI's units are; seeds follow the workflow's."""
    (sigmas,) = comfyui.FanalSigmas().build("logsnr", "", 8, 30.0, 0.02, zero, FLOW)
    assert float(sigmas[0]) == 1
    end, noise, _, shown = sample(CONST(), name, options, sigmas)
    t = sigmas.double()

    def truth(x, sigma):
        return torch.zeros_like(x) if torch.isinf(sigma) else mixture()(x, sigma)

    want = fanal.sample(truth, noise.double(), t / (1 - t), solver, range(7, 10))
    torch.testing.assert_close(end.double(), want, rtol=0, atol=2e-4)
    assert len(shown) == 8


def test_from_an_image_half_way():
    """A grid that begins low, latents that are not empty: image to image."""
    for sampling, kind in ((EPS(), SD), (CONST(), FLOW)):
        (sigmas,) = comfyui.FanalSigmas().build("logsnr", "", 9, 2.0, 0.02, True, kind)
        sigmas = sigmas[1:]  # ComfyUI's SplitSigmas
        end, noise, _, _ = sample(sampling, "heun", "", sigmas, latent=2.0)
        grid = sigmas.double() / (1 - sigmas.double()) if kind == FLOW else sigmas.double()
        want = fanal.sample(mixture(), 2.0 + noise.double() * grid[0], grid, Heun())
        torch.testing.assert_close(end.double(), want, rtol=0, atol=1e-4)


def test_units_that_do_not_fit_are_told():
    (sigmas,) = comfyui.FanalSigmas().build("polynomial", "", 8, 14.6, 0.03, True, SD)
    with pytest.raises(FanalError, match=r"times of a flow model lie in \[0, 1\]"):
        sample(CONST(), "euler", "", sigmas)
    with pytest.raises(FanalError, match="two steps or more"):
        comfyui.FanalSigmas().build("polynomial", "", 1, 14.6, 0.03, True, FLOW)
    with pytest.raises(FanalError, match="0 < sigma_min < sigma_max"):
        comfyui.FanalSigmas().build("polynomial", "", 5, 0.01, 0.03, True, SD)
    with pytest.raises(FanalError, match="field of schedule"):
        comfyui.FanalSigmas().build("polynomial", "rh=5", 5, 14.6, 0.03, True, SD)


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def test_sigmas_from_a_file(tmp_path):
    values = [14.6, 3.0, 0.5, 0.0]
    for name, value in (("list", values), ("object", {"sigmas": values, "about": "AYS"})):
        sigmas, end = comfyui.FanalSigmasFromFile().load(write(tmp_path / name, value), 0, SD)
        assert torch.equal(sigmas, torch.tensor(values))
        assert end == "ends at 0"
    sigmas, end = comfyui.FanalSigmasFromFile().load(write(tmp_path / "short", [14.6, 3, 0.03]), 0, SD)
    assert "ends at sigma_min = 0.03" in end
    sigmas, _ = comfyui.FanalSigmasFromFile().load(write(tmp_path / "far", "[Infinity, 4.0, 1.0, 0.0]"), 0, FLOW)
    assert torch.allclose(sigmas, torch.tensor([1.0, 0.8, 0.5, 0.0]))
    with pytest.raises(FanalError, match="choose flow time"):
        comfyui.FanalSigmasFromFile().load(str(tmp_path / "far"), 0, SD)


def test_a_searched_schedule_with_its_solver(tmp_path):
    """Both nodes on one file: the searched weights act, on the grid with as many steps."""
    from fanal.schedule_files import Entry, Schedules, read_schedules, write_schedules

    grids = {n: fanal.schedules.polynomial(n, 0.03, 14.6, zero=False) for n in (3, 4)}
    rows = [[1.0], [1.4, -0.4], [1.5, -0.5]]
    entries = {3: Entry(grids[3], "ipndm:order=2", 3, rows), 4: Entry(grids[4], "euler", 4)}
    path = tmp_path / "searched.json"
    write_schedules(path, Schedules("mixture:grid2", entries))
    sigmas, end = comfyui.FanalSigmasFromFile().load(str(path), 3, SD)
    assert "sigma_min = 0.03" in end
    assert len(sigmas) == 4
    (node,) = comfyui.FanalSamplerFromFile().load(str(path))
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(7))
    got = node.sample(
        Guider(EPS()), sigmas, {"model_options": {}, "seed": 7}, lambda *_: None, noise, torch.zeros_like(noise)
    )
    solver = read_schedules(path).build_solver(fanal.config.build_solver)
    x = noise.double() * (1 if sigmas[0] < 14.6 else float(sigmas[0]))
    want = fanal.sample(mixture(), x, sigmas.double(), solver)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)
    plain = fanal.sample(mixture(), x, sigmas.double(), Euler())
    assert not torch.allclose(want, plain, atol=1e-2)
    with pytest.raises(FanalError, match="grids of 3, 4 steps"):
        comfyui.FanalSigmasFromFile().load(str(path), 0, SD)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[1, 2", "cannot read"),
        ('{"grid": [1, 0]}', "list of 2 to"),
        ("[1]", "list of 2 to"),
        ('["14.6", "0"]', "list of 2 to"),
        ("[true, false]", "list of 2 to"),
        ("[1, 2, 3]", "decreases"),
        ("[3, 1, 1, 0]", "strictly monotone"),
        ("[3, NaN, 0]", "finite"),
        ("[3, 1, -1]", "finite and >= 0"),
        ("[" * 100_000, "cannot read"),
        (json.dumps(list(range(20_000, 0, -1))), "list of 2 to"),
        (" " * (2**20 + 1), "at most"),
        ("[1e999, 1]", None),
        (f"[{'9' * 5000}, 1]", "cannot read"),
        (f"[{'9' * 400}, 1]", "too large"),
    ],
    ids=range(15),
)
def test_files_that_hold_no_grid(tmp_path, value, words):
    path = write(tmp_path / "sigmas.json", value)
    if words is None:  # infinity, which a flow model may start from
        assert torch.isinf(comfyui.read_sigmas(path)[0])
        return
    with pytest.raises(FanalError, match=words):
        comfyui.read_sigmas(path)


def test_a_missing_file_and_a_changed_one(tmp_path):
    with pytest.raises(FanalError, match="cannot read .*none.json"):
        comfyui.read_sigmas(tmp_path / "none.json")
    path = write(tmp_path / "sigmas.json", [2.0, 0.0])
    before = comfyui.FanalSigmasFromFile.IS_CHANGED(path, 0, SD)
    assert before == comfyui.FanalSigmasFromFile.IS_CHANGED(path, 0, SD)
    write(tmp_path / "sigmas.json", [3.0, 0.0])
    assert before != comfyui.FanalSigmasFromFile.IS_CHANGED(path, 0, SD)
    assert comfyui.FanalSigmasFromFile.IS_CHANGED(path, 0, SD) != comfyui.FanalSigmasFromFile.IS_CHANGED(path, 0, FLOW)
    assert comfyui.FanalSamplerFromFile.IS_CHANGED(str(tmp_path / "none.json")) == ""


def test_the_nodes_say_what_comfyui_asks():
    """Each widget is an argument of the node's function, each list a registry, each output has a type."""
    import inspect

    mappings, titles = comfyui.NODE_CLASS_MAPPINGS, comfyui.NODE_DISPLAY_NAME_MAPPINGS
    plain = {f"Fanal{s}{f}" for s in ("Sampler", "Sigmas") for f in ("", "FromFile")}
    guards = {"FanalGuard", "FanalWatch", "FanalRedraw", "FanalFlag"}
    assert mappings.keys() == titles.keys() == plain | guards
    for node in mappings.values():
        widgets = node.INPUT_TYPES()["required"]
        function = getattr(node, node.FUNCTION)
        assert list(widgets) == [name for name in inspect.signature(function).parameters if name != "self"]
        assert set(node.RETURN_TYPES) <= {"SAMPLER", "SIGMAS", "STRING", "LATENT", "FANAL_WATCH"}
        assert node.CATEGORY.startswith("sampling/custom_sampling")
        for kind, *options in widgets.values():
            wire = kind in ("SAMPLER", "LATENT", "FANAL_WATCH")
            assert isinstance(kind, list) or wire or kind in ("STRING", "INT", "FLOAT", "BOOLEAN")
            assert isinstance(kind, list) or wire or "default" in options[0]
    assert comfyui.FanalSampler.INPUT_TYPES()["required"]["solver"] == (list(SOLVERS),)
    assert comfyui.FanalSigmas.INPUT_TYPES()["required"]["schedule"] == (list(SCHEDULES),)


def test_a_wrong_option_is_told_before_the_workflow_runs():
    assert comfyui.FanalSampler.VALIDATE_INPUTS("churn", "s_churn=20") is True
    assert "did you mean 's_churn'" in comfyui.FanalSampler.VALIDATE_INPUTS("churn", "s_chrn=20")


def test_the_folder_for_custom_nodes(monkeypatch):
    """It hands on the registry; without fanal it says what to do."""
    path = ROOT / "integrations" / "comfyui" / "__init__.py"

    def load():
        spec = importlib.util.spec_from_file_location("custom_nodes_fanal", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    assert load().NODE_CLASS_MAPPINGS is comfyui.NODE_CLASS_MAPPINGS
    for name in [name for name in sys.modules if name == "fanal" or name.startswith("fanal.")]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "fanal":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="python -m pip install fanal"):
        load()
