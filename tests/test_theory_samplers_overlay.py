"""One solution three ways: density, particles and network of `fanal bench overlay` agree where they should."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from scipy import stats

from fanal import pde
from fanal.bench.overlay import OverlayConfig, overlay, scatter
from fanal.files import read_tensors
from toys import fanal


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = OverlayConfig(
        "two-bumps", cells=30, steps=16, budgets=(4, 8), iterations=(20, 300), train=2000, width=32, count=400
    )
    return overlay(config, tmp_path_factory.mktemp("overlay") / "run")


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["results"]


def test_particles_have_the_density(results):
    assert results["ks"]["agree"]
    assert min(results["ks"]["p"]) > 1e-3
    assert results["density"]["exact score"]["mass error"] < 1e-12
    assert results["density"]["exact score"]["least"] >= 0
    assert results["density"]["exact score"]["tv"] < 0.12  # 30 cells of 0.33 for humps of 0.4


def test_smaller_steps_bring_particles_to_their_twins(results):
    """Heun is of order 2: halving the steps takes at least a half of the distance; measured on the same starts."""
    coarse, fine, shown = (results["steps"]["ode"][n]["twins"]["value"] for n in ("4", "8", "16"))
    assert coarse > 2 * fine > 4 * shown
    assert "twins" not in results["steps"]["sde"]["4"]  # noise on another grid is another noise
    assert results["steps"]["ode"]["8"]["calls"] == 16


def test_training_brings_the_network_to_the_exact_score(results):
    for way in ("sde", "ode"):
        first, last = (results["training"][way][i]["twins"]["value"] for i in ("20", "300"))
        assert first > 1.5 * last
    assert results["losses"]["20"] > results["losses"]["300"]


def test_the_frames_go_from_noise_to_data(run):
    tensors, _ = read_tensors(run / "ways.safetensors")
    assert tensors["times"][0] == 3
    assert float(tensors["times"][-1]) == pytest.approx(0.01)
    assert len(tensors["density"]) == len(tensors["particles"]) == len(tensors["network"]) == 17
    assert torch.equal(tensors["particles"][0], tensors["network"][0])  # the same noise
    assert stats.kstest(tensors["particles"][0].flatten().numpy(), "norm").pvalue > 1e-3
    ends = tensors["particles"][-1][:, 0].numpy()
    assert 0.25 < float((ends < -0.25).mean()) < 0.55  # 40 % of the data are in the left hump


def test_the_page_moves_and_tells_the_figures(run, results):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("t = ") >= 17
    assert "sliders" in page
    assert f"{results['floor']['sliced W2']['value']:.4f}" in page
    assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="https?:', page)
    assert f"{results['steps']['ode']['8']['twins']['value']:.5f}" in (run / "tables.md").read_text(encoding="utf-8")


def test_the_page_can_be_made_again(run):
    before = (run / "report.html").read_text(encoding="utf-8")
    (run / "report.html").unlink()
    told = fanal("report", run)
    assert told.exit_code == 0, told.output
    assert (run / "report.html").read_text(encoding="utf-8") == before


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    """What is there is kept, and the end is the same."""
    config = OverlayConfig(cells=16, steps=4, budgets=(2,), iterations=(3,), train=64, width=8, count=64)
    whole = overlay(config, tmp_path / "whole")
    calls = []

    def stop(items, what):
        calls.append(what)
        for item in items:
            if what == "particles" and item == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        overlay(config, tmp_path / "cut", progress=stop)
    said = []
    again = overlay(config, tmp_path / "cut", say=said.append)
    assert "resuming" in said[0]
    assert calls == ["training", "particles"]
    one, two = (json.loads((folder / "run.json").read_text())["results"] for folder in (whole, again))
    for each in (one, two):
        for own in each["density"].values():
            del own["seconds"]
    assert one == two


def test_scattered_points_have_the_cells_masses():
    grid = pde.Grid((np.array([0.0, 1.0, 3.0]), np.array([0.0, 1.0, 2.0])))
    points = scatter(grid, np.array([[0.1, 0.3], [0.1, 0.2]]), 4000, seed=1)
    inside = (points[:, 0] > 1) & (points[:, 1] > 1)
    assert abs(float(inside.double().mean()) - 0.4) < 4 * (0.24 / 4000) ** 0.5
    assert stats.kstest((points[inside][:, 0].numpy() - 1) / 2, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--law", "shell"), "two axes"),
        (("--law", "nothing"), "law"),
        (("--cells", "4"), "cells must be"),
        (("--budgets", "5,4"), "increasing"),
        (("--iterations", "a"), "--iterations takes whole numbers"),
    ],
)
def test_mistakes_are_told(words, said, tmp_path):
    told = fanal("bench", "overlay", *words, "--out", tmp_path / "run")
    assert told.exit_code == 2
    assert said in " ".join(told.output.split())
    assert not list(tmp_path.iterdir())
