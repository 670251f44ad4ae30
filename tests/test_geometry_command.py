"""`fanal geometry`: its figures are those of the trajectories, for any block, and its page draws them."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

import fanal as package
from fanal import geometry
from fanal.errors import FanalError
from fanal.geometry.command import GeometryConfig
from fanal.geometry.command import geometry as measure
from fanal.report import write_report
from fanal.trajectory import Trajectory
from toys import fanal, record, refused

STEPS, COUNT = 16, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Trajectories of the digits' Gaussian, beside the exact denoiser of some digits."""
    out = tmp_path_factory.mktemp("geometry") / "run"
    config = GeometryConfig("gaussian:digits8", steps=STEPS, count=COUNT, drawn=4, block=5, data="digits8", points=90)
    return measure(config, out)


@pytest.fixture(scope="module")
def run():
    model = package.load("gaussian:digits8")
    x = package.noise(model.shape, range(COUNT), 80.0)
    return Trajectory.record(package.trace(model, x, package.schedules.polynomial(STEPS), package.solvers.Euler()))


def test_bands_are_those_of_all_trajectories_together(folder, run):
    bands = record(folder)["results"]["bands"]
    for name, values in geometry.curves(run).items():
        whole = geometry.Band.of(values)
        for part in ("mean", "std", "low", "high"):
            got = torch.tensor(bands[name][part], dtype=torch.float64)
            assert torch.allclose(got, getattr(whole, part), rtol=1e-4, atol=1e-5), (name, part)
    assert set(bands) == set(geometry.curves(run)) | {"score deviation", "entropy", "log density"}


def test_numbers_are_means_over_trajectories(folder, run):
    told = record(folder)["results"]
    found, length = geometry.project(run.x, 5), geometry.length(run.x)[-1]
    numbers = told["numbers"]
    assert numbers["explained by 2"]["value"] == pytest.approx(float(found.explained[:, :2].sum(1).mean()), rel=1e-5)
    assert numbers["mean error in 3-D"]["value"] == pytest.approx(float(found.error[2].mean()), rel=1e-3, abs=1e-5)
    assert numbers["length / (sigma_max sqrt d)"]["value"] == pytest.approx(float(length.mean()) / (80 * 8), rel=1e-5)
    assert record(folder)["network"] == {"calls": 3 * STEPS, "evaluations": COUNT * STEPS}


def test_drawn_curves_are_the_first_ones(folder, run):
    drawn = load_file(folder / "geometry.safetensors")
    mine, _, _ = geometry.align(geometry.project(run.x[:, :4], 2).coordinates)
    assert torch.allclose(drawn["aligned"], mine, atol=1e-2)
    assert drawn["curvature"].shape == (4, STEPS + 1)


def test_the_exact_denoiser_stands_beside_the_model(folder, tmp_path):
    """A `data:` model has no score deviation; the digits' Gaussian has, and none where both are the mean."""
    own = GeometryConfig("data:digits8,count=90", steps=8, count=4, drawn=2, window=2, data="digits8", points=90)
    bands = record(measure(own, tmp_path / "own"))["results"]["bands"]
    assert max(bands["score deviation"]["high"]) < 1e-4
    entropy = bands["entropy"]["mean"]
    assert entropy[0] == pytest.approx(math.log(90), rel=0.01)
    assert entropy[-1] < 0.01
    other = record(folder)["results"]["bands"]["score deviation"]["mean"]
    assert other[0] < 0.1 < max(other)


def test_trajectories_under_a_class_stand_beside_its_points(tmp_path):
    shared = {"steps": 8, "drawn": 2, "window": 2, "data": "digits8", "block": 3}
    own = GeometryConfig("data:digits8,count=90", count=6, points=90, label="each", **shared)
    results = record(measure(own, tmp_path / "own"))["results"]
    assert max(results["bands"]["score deviation"]["high"]) < 1e-4
    assert results["bands"]["entropy"]["high"][0] < math.log(20)  # about nine of each class
    assert results["numbers"]["stage.entropy.first"]["value"] < 40
    few = GeometryConfig("data:digits8", count=2, points=2, label=3, **shared)
    with pytest.raises(FanalError, match="class 3"):
        measure(few, tmp_path / "few")


def test_blocks_change_nothing_but_rounding(folder, tmp_path):
    whole = GeometryConfig("gaussian:digits8", steps=STEPS, count=COUNT, drawn=4, data="digits8", points=90)
    a, b = record(folder)["results"], record(measure(whole, tmp_path / "whole"))["results"]
    for name, value in a["numbers"].items():
        assert value["value"] == pytest.approx(b["numbers"][name]["value"], rel=1e-4, abs=1e-5), name


def test_stages_are_found_where_they_were_put():
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])
    bend = torch.tensor([[0.0, 0.0], [0.2, 0.0], [1.0, 0.0], [0.3, 0.0], [0.05, 0.0]])
    found = geometry.by_curvature(bend, sigmas)
    assert found.first.tolist()[0] == 4
    assert found.last.tolist()[0] == 1
    assert bool(found.first[1].isnan())
    entropy = math.log(100) * torch.tensor([[1.0], [0.97], [0.6], [0.1], [0.0]])
    found = geometry.by_entropy(entropy, sigmas, math.log(100))
    assert (float(found.first), float(found.last)) == (2, 1)
    with pytest.raises(FanalError, match="share"):
        geometry.by_curvature(bend, sigmas, 1.0)
    with pytest.raises(FanalError, match="each of 5 levels"):
        geometry.by_entropy(entropy[:3], sigmas, 1.0)


def test_the_command_prints_and_refuses(tmp_path):
    out = tmp_path / "run"
    words = ("geometry", "mixture:ring8", "--steps", 6, "--window", 2, "--count", 3, "--out", out)
    result = fanal(*words)
    assert result.exit_code == 0, result.output
    assert "largest deviation / chord" in result.output
    assert refused(fanal(*words), "overwrite")
    assert refused(fanal("geometry", "mixture:ring8", "--steps", 6, "--out", tmp_path / "b"), "window")
    with pytest.raises(FanalError, match="steps must be at least 5"):
        GeometryConfig("mixture:ring8", steps=4, window=2)
    wrong = fanal("geometry", "mixture:ring8", "--data", "digits8", "--out", tmp_path / "c")
    assert refused(wrong, "digits8", "shape")
    (out / "report.html").unlink()
    assert write_report(out).is_file()


@pytest.mark.browser
def test_the_page_opens_offline_and_small_screens_need_no_scrolling(browser, folder):
    assert (folder / "report.html").stat().st_size < 8e6
    page = browser.new_page(viewport={"width": 360, "height": 800}, color_scheme="dark")
    told, asked = [], []
    page.on("console", lambda m: told.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((folder / "report.html").absolute().as_uri(), wait_until="load")
    page.wait_for_selector("#entropy .main-svg")
    assert told == []
    assert all(url.startswith(("data:", "blob:")) for url in asked[1:])
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 25, 31)"
    assert page.evaluate("document.querySelector('#boomerang').data.length") == 4
    page.close()
