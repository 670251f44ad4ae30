"""`fanal pde`: its figures are those of the solved equations, resumed or not, and its page moves."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from plotly.offline import get_plotlyjs
from safetensors.torch import load_file

from fanal import pde
from fanal.denoiser import Model
from fanal.errors import FanalError
from fanal.pde import command
from fanal.pde.command import DensityConfig, densities
from fanal.report import write_figures, write_report
from fanal.report.pde import headlines
from toys import fanal, part_of, record, refused, same

QUICK: dict[str, Any] = {"cells": 120, "steps": 60, "particles": 2000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return densities(DensityConfig(**QUICK), tmp_path_factory.mktemp("pde") / "run")


def test_figures_are_those_of_the_densities(folder):
    results, tensors = record(folder)["results"], load_file(folder / "densities.safetensors")
    own = pde.law("two-bumps")
    grid, times = own.grid(120), tensors["times"].numpy()
    assert (times[0], times[1], times[-1]) == pytest.approx((0, 0.01, 2.0))
    for name, at in (("forward", times), ("stable", times[:0:-1]), ("ode", times[:0:-1])):
        found = tensors[name].numpy()
        errors = [pde.tv(grid, p, own.cells(grid, float(t))) for p, t in zip(found, at, strict=True)]
        assert results[name]["tv"] == pytest.approx(errors, abs=1e-12)
        assert results[name]["least density"] == found.min() >= 0
        assert results[name]["mass error"] < 1e-12
        assert results[name]["end"]["w2"] == pytest.approx(pde.w2(grid, found[-1], own.cells(grid, float(at[-1]))))
        assert max(errors) < 0.05
    assert results["stable"]["end"]["tv"] < results["ode"]["end"]["tv"]
    assert results["unstable"]["rate"] == pytest.approx(results["unstable"]["theory"], rel=0.03)
    assert [w["measured"] for w in results["unstable"]["waves"]] == pytest.approx([1, 2, 3, 4, 5], abs=1e-2)
    assert results["particles"]["agree"]


def test_its_page_has_a_slider_and_figures(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "http" not in page.split("<h1>")[1].split("Plotly.newPlot")[0]
    for words in ("fanal pde: two-bumps", "stable reverse: mass 1", '"sliders"', "The unstable reverse", "4/h²"):
        assert words in page, words
    assert '"active":1' in page  # at t = 0 ways back have no density
    assert "its time s runs" in page.lower()
    names = {path.stem for path in write_figures(folder, ("png",))}
    assert {"errors", "snapshots", "growth", "solutions", "rates"} <= names


def test_a_page_of_many_cells_draws_some(tmp_path):
    config = DensityConfig(cells=8000, steps=3, particles=0, back=("stable",))
    page = (densities(config, tmp_path / "run") / "report.html").read_text(encoding="utf-8")
    assert len(page) - len(get_plotlyjs()) < 1_500_000  # with all cells it would be 7 MB


BOXES = """selector => [...document.querySelectorAll(selector)].filter(e => e.textContent.trim()).map(e => {
  const box = e.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom]; })"""


@pytest.mark.browser
def test_its_page_is_read_on_a_phone_in_the_dark(browser, folder):
    """The button is not painted white, no words lie over others, and no tools over them."""
    write_report(folder)
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark", has_touch=True)
    page.set_default_timeout(180_000)  # drawing in software takes long on a busy machine
    page.goto((folder / "report.html").absolute().as_uri(), wait_until="load")
    page.wait_for_selector("#growth .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.hover("#densities .updatemenu-button")
    for rect in page.locator("#densities .updatemenu-item-rect").all():
        assert rect.evaluate("e => getComputedStyle(e).fill").replace(" ", "") in ("transparent", "rgba(0,0,0,0)")
    page.evaluate(
        "document.querySelector('#densities')._transitionData._frames.slice(9, 10).map("
        "f => Plotly.animate('densities', [f.name], {mode: 'immediate', frame: {duration: 0}}))"
    )
    page.wait_for_function("document.querySelectorAll('#densities .gtitle tspan').length > 2")
    for words in ("#growth .ytick text", "#densities .gtitle tspan.line, #densities .legendtext"):
        boxes = page.evaluate(BOXES, words)
        assert len(boxes) > 4, words
        for i, (left, top, right, bottom) in enumerate(boxes):
            for a, b, c, d in boxes[:i]:
                assert right <= a + 1 or c <= left + 1 or bottom <= b + 3 or d <= top + 3, words
    assert page.evaluate("[...document.querySelectorAll('.modebar')].filter(e => e.offsetHeight > 0).length") == 0
    page.close()


def test_particles_that_are_others_are_told(tmp_path, monkeypatch):
    """Kolmogorov–Smirnov can fail: 2,000 particles of a law moved by 0.3."""
    part = pde.Law.part
    monkeypatch.setattr(pde.Law, "part", lambda *given: part(*given) + 0.3)
    found = record(densities(DensityConfig(**QUICK, back=("stable",)), tmp_path / "run"))["results"]["particles"]
    assert not found["agree"]


def _stopped(config, out, monkeypatch, at):
    """Stop a run at one of its calls of the solver, and return the list that later calls go to as well."""
    solve, calls = command.evolve, []

    def stopped(*given, **more):
        calls.append(given)
        if len(calls) == at:
            raise KeyboardInterrupt
        return solve(*given, **more)

    monkeypatch.setattr(command, "evolve", stopped)
    with pytest.raises(KeyboardInterrupt):
        densities(config, out)
    return calls


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    config = DensityConfig(**QUICK, law="box", start="normal", back=("stable",))
    whole = load_file(densities(config, tmp_path / "whole") / "densities.safetensors")
    calls = _stopped(config, tmp_path / "run", monkeypatch, 5)
    assert len(list(part_of(tmp_path / "run").glob("[fs]*-0*.safetensors"))) == 4  # forward and stable
    again = load_file(densities(config, tmp_path / "run") / "densities.safetensors")
    assert same(whole, again)
    assert len(calls) == 5 + len(whole["times"]) // 20 * 2 + 2 - 4 - 1


def test_brownian_motion_between_walls(tmp_path):
    """The forward density tends to the uniform one, ways back return, and mirrored particles agree."""
    config = DensityConfig(**QUICK, process="brownian", reach=3.0, end=6.0)
    folder = densities(config, tmp_path / "run")
    results, tensors = record(folder)["results"], load_file(folder / "densities.safetensors")
    # The longest wave is a sine: it shrinks by e^{−(π/6)²·6} = 0.19.
    assert np.abs(tensors["forward"][-1].numpy() - 1 / 6).max() < 0.19 / 6
    assert results["stable"]["end"]["tv"] < 0.02
    assert results["particles"]["agree"]
    rates = [w["theory"] for w in results["unstable"]["waves"]]
    assert rates == pytest.approx([(n * math.pi / 6) ** 2 for n in range(1, 6)])
    assert [w["measured"] for w in results["unstable"]["waves"]] == pytest.approx(rates, rel=0.01)


def test_scores_of_models(tmp_path):
    """The closed form by its model spec is the closed form; another model's score leads elsewhere."""
    shared: dict[str, Any] = {
        "law": "gaussian:tilted2",
        "cells": 32,
        "steps": 16,
        "particles": 0,
        "back": ("stable",),
        "end": 1.0,
    }
    ends = []
    for score in ("exact", "gaussian:tilted2", "mixture:ring8", "forward"):
        folder = densities(DensityConfig(**shared, score=score), tmp_path / score.replace(":", "-"))
        ends.append(record(folder)["results"]["stable"]["end"]["tv"])
    assert ends[1] == pytest.approx(ends[0], abs=1e-12)
    assert ends[0] < ends[2] / 2
    assert ends[3] == pytest.approx(ends[0], abs=0.1)


def test_scores_of_brownian_motion_between_walls(tmp_path):
    """Closed form and solution lead back alike; a model of the law knows no walls, which are near here."""
    shared: dict[str, Any] = {**QUICK, "process": "brownian", "reach": 3.0, "end": 2.0, "back": ("stable",)}
    ends = {}
    for score in ("exact", "forward", f"python:{__name__}:free"):
        folder = densities(DensityConfig(**shared, score=score), tmp_path / score.split(":")[0])
        results = record(folder)["results"]
        assert results["closed form"]
        assert results["forward"]["largest tv"] < 0.01
        ends[score[:5]] = results["stable"]["end"]["tv"]
    assert ends["forwa"] == pytest.approx(ends["exact"], abs=0.01)
    assert ends["exact"] < 0.01 < 0.02 < ends["pytho"]


def free() -> Model:
    """The law's denoiser as a model of the user's."""
    return pde.law("two-bumps").denoiser


class Picky:
    """A network of float32 that is somewhere else, as on an accelerator; it answers on its own."""

    shape, sigma_min, sigma_max = (1,), 0.002, 80.0

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, /) -> torch.Tensor:
        assert (x.device.type, x.dtype) == ("meta", torch.float32)
        assert (sigma.device.type, sigma.dtype, sigma.ndim) == ("cpu", torch.float64, 0)
        self.asked += len(x)
        return torch.full(x.shape, 0.5, dtype=torch.float32)


def test_a_network_is_asked_where_it_is_and_in_its_dtype(tmp_path, monkeypatch):
    network = Picky()
    score = pde.score_of_denoiser(network, device="meta", dtype=torch.float32)
    points, time = np.linspace(-2, 2, 9)[:, None], 0.3
    found = score(points, time)
    scale, sigma = math.exp(-time), math.sqrt(math.expm1(2 * time))
    assert (found.dtype, network.asked) == (np.float64, 9)
    assert np.allclose(found, (0.5 - points / scale) / sigma**2 / scale, rtol=1e-5)
    # What the command passes on, for networks and for closed forms.
    monkeypatch.setattr("fanal.loading.load", lambda spec, device: network)
    config = DensityConfig(**QUICK, score="picky", device="meta", back=("stable",))
    densities(config, tmp_path / "run")
    assert network.asked > 9
    with pytest.raises(AssertionError):
        densities(dataclasses.replace(config, score="gaussian:tilted2"), tmp_path / "other")


def test_a_set_that_changed_is_noticed(tmp_path, monkeypatch):
    """A law fitted to a file is another one when the file is: an unfinished run does not go on with it."""
    place, rng = tmp_path / "set.npy", np.random.default_rng(0)
    np.save(place, rng.standard_normal((50, 2)).astype(np.float32))
    config = DensityConfig(law=f"gaussian:{place}", cells=24, steps=45, particles=0, back=("stable",))
    _stopped(config, tmp_path / "run", monkeypatch, 2)
    np.save(place, 2 * rng.standard_normal((50, 2)).astype(np.float32))
    with pytest.raises(FanalError, match="law: '"):
        densities(config, tmp_path / "run")


def test_the_wall_of_a_ball_is_no_mirror_for_particles(tmp_path):
    """Mirrored lengths are not reflected motion: they are not drawn, and nothing is said of them."""
    config = DensityConfig(**QUICK, law="core-and-halo", dimension=3, process="brownian", back=("stable",))
    assert "particles" not in record(densities(config, tmp_path / "run"))["results"]


def test_a_uniform_start_in_many_dimensions_is_finite(tmp_path):
    config = DensityConfig(
        law="shell", dimension=784, start="uniform", cells=40, steps=4, particles=0, back=("stable",)
    )
    first = load_file(densities(config, tmp_path / "run") / "densities.safetensors")["stable"][0]
    assert bool(first.isfinite().all())
    assert float(first[-1]) == float(first.max()) > 0


@pytest.mark.parametrize("start", ["normal", "uniform"])
def test_starts_of_a_radial_law(tmp_path, start):
    config = DensityConfig(**QUICK, law="core-and-halo", dimension=3, start=start, back=("stable",))
    tensors = load_file(densities(config, tmp_path / "run") / "densities.safetensors")
    r = tensors["centers.0"].numpy()
    want = r**2 * (np.exp(-(r**2) / 2) if start == "normal" else 1.0)
    first = tensors["stable"][0].numpy()
    assert np.allclose(first / first.sum(), want / want.sum(), rtol=1e-9)


def test_the_command_says_what_it_found(tmp_path):
    small = ("--cells", 36, "--steps", 8, "--early", 0.2)
    done = fanal("pde", "ring", *small, "--figures", "svg", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "figures" / "growth.svg").is_file()
    assert "0e+00" not in done.output
    for words in (
        "Mass is kept to",
        "no density is negative",
        "The stable reverse ends",
        "20,000 exact particles",
        "report.html",
    ):
        assert words in done.output
    assert refused(fanal("pde", "--out", tmp_path / "run"), "finished run", "--overwrite")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ringg",), "did you mean 'ring'"),
        (("--back", "stabel"), "did you mean 'stable'"),
        (("--process", "browniann"), "did you mean 'brownian'"),
        (("--start", "here"), "forward, normal, uniform"),
        (("shell", "--process", "brownian", "--score", "exact"), "--score forward"),
        (("box", "--reach", "0.5"), "larger --reach"),
        (("--score", "grid2"), "two-bumps has 1 coordinate;"),
        (("--score", "grid3"), "unknown model"),
        (("--cells", "5000", "--steps", "50000"), "at most 3,999 --steps"),
        (("ring", "--steps", "30000"), "192,000,000 numbers for each solution"),
        (("--particles", "20000000"), "particles must be"),
        (("--early", "3"), "early < end"),
        (("--cells", "3"), "cells must be"),
        (("ring", "--cells", "500"), "take fewer"),
        (("mixture:grid2", "--dimension", "3"), "leave --dimension out"),
    ],
)
def test_what_cannot_be_solved_is_told(tmp_path, words, said):
    assert refused(fanal("pde", *words, "--out", tmp_path / "run"), said)
    assert not list(tmp_path.iterdir())


def test_a_density_that_is_lost_on_the_way_names_the_cure(tmp_path):
    with pytest.raises(FanalError, match="smaller steps, or implicit"):
        densities(DensityConfig(law="two-bumps", scheme="trapezoid", cells=400, steps=6), tmp_path / "run")


def test_other_starts_end_where_the_theory_has_them_end(tmp_path):
    """[PDE] eq. 3.19 for a uniform start: far from the data's density, and cells of half the size come nearer to it."""
    told = []
    for cells in (100, 200):
        config = DensityConfig(start="uniform", end=1.0, cells=cells, steps=cells, back=("stable",), particles=0)
        results = record(densities(config, tmp_path / str(cells)))["results"]["stable"]
        told.append(results["told"]["tv"])
        assert results["end"]["tv"] > 20 * told[-1]
    assert told[1] < 0.6 * told[0]
    plain = record(densities(DensityConfig(cells=60, steps=20, particles=0), tmp_path / "plain"))["results"]["stable"]
    assert "told" not in plain


def test_the_first_interval_is_cut_as_finely_as_the_others(tmp_path):
    """Before `early` no score is needed, and one step would be all of the error: with 50 steps it was 0.028."""
    config = DensityConfig(early=1.0, end=1.3, cells=200, steps=50, back=("stable",), particles=0)
    found = record(densities(config, tmp_path / "run"))["results"]
    assert found["forward"]["largest tv"] < 2e-3
    assert found["stable"]["end"]["tv"] < 4e-3


def test_odd_runs_are_told_for_what_they_are(tmp_path):
    """A rate that nothing tells; a wide box, where the density underflows; seeds and reaches that are none."""
    short = record(densities(DensityConfig(cells=8, steps=2, particles=0), tmp_path / "short"))
    assert any("not measured" in line for line in headlines(short))
    wide = DensityConfig(start="uniform", reach=40.0, cells=400, steps=20, back=("stable",), particles=0)
    assert math.isfinite(record(densities(wide, tmp_path / "wide"))["results"]["stable"]["told"]["tv"])
    for settings, words in (
        ({"seed": 10**22}, "seed must be"),
        ({"threads": 0}, "threads"),
        ({"law": "shell", "dimension": 784, "reach": 10.0}, "reach must be above 12"),
        ({"law": "mixture:grid2", "cells": 30}, "1.27.* take more --cells"),
    ):
        with pytest.raises(FanalError, match=words):
            densities(DensityConfig(**settings), tmp_path / "none")
