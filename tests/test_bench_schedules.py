"""The comparison of schedules: its figures are recomputed, its counts are by hand, and it resumes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import fanal as package
from fanal import gits
from fanal.bench import schedules as bench
from fanal.bench.plans import compare
from fanal.bench.schedule_tables import results_of, tables
from fanal.bench.schedules import SchedulesConfig, mixture
from fanal.files import read_tensors
from fanal.schedules import logsnr, polynomial
from fanal.seeding import SEED_STRIDE, noise
from fanal.solvers import RK4, Euler
from toys import fanal

TINY = SchedulesConfig(mixtures=1, models=(), solvers=("euler", "heun"), calls=(5, 6), warmup=8, test=16, reference=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return compare(TINY, tmp_path_factory.mktemp("bench") / "run")


def test_cells_spend_exactly_their_calls():
    assert list(TINY.cells()) == [("euler", 5, 5), ("euler", 6, 6), ("heun", 6, 3)]


def test_an_error_is_the_distance_to_the_true_end(folder):
    """One cell again, from the parts: the mixture, the noise, the grid and the reference."""
    errors, _ = read_tensors(folder / "errors.safetensors")
    model = mixture(0)
    x = noise(model.shape, range(16), 80.0, stream="bench test", dtype=torch.float64)
    ends = package.sample(model, x, logsnr(100, zero=False), RK4())
    off = package.sample(model, x, polynomial(5, zero=False), Euler()) - ends
    expected = off.square().mean(1).sqrt().float()
    torch.testing.assert_close(errors["mixture 0|euler|5|polynomial"], expected, rtol=1e-6, atol=1e-9)
    finer = package.sample(model, x, logsnr(200, zero=False), RK4())
    assert float((finer - ends).abs().max()) < 1e-4  # far below what is compared, and 4^4 times less with 400 steps


def test_mixtures_are_what_they_say():
    first, again, other = mixture(3), mixture(3), mixture(4)
    assert torch.equal(first.means, again.means)
    assert not torch.equal(first.means, other.means)
    assert float(first.means.square().mean().sqrt()) == pytest.approx(0.5)
    assert (first.shape, len(first.means)) == ((48,), 6)


def test_test_samples_are_no_warm_up_samples():
    streams = [noise((3,), range(SEED_STRIDE, SEED_STRIDE + 4), stream=s) for s in ("bench test", "bench warm-up")]
    assert not torch.isclose(streams[0], streams[1]).any()


def test_the_folder_has_every_figure(folder):
    results = json.loads((folder / "run.json").read_text())["results"]
    own = results["problems"]["mixture 0"]
    assert own["euler|5|gits"]["calls"] == 60
    assert own["euler|5|fit"]["calls"] > 60
    assert own["euler|5|polynomial"]["rms"]["n"] == 16
    assert "heun|6|fit" in own
    assert "heun|6|weights" not in own
    text = (folder / "tables.md").read_text()
    assert "| heun, 6 |" in text
    best = results["best"]["5"]["mixture 0"]
    fits = ("fit", "fit-mean", "weights", "weights-mean")
    score = "mean held-out"
    assert own[best["ours"]][score] == min(own[f"euler|5|{name}"][score] for name in fits)


def test_the_best_fit_is_chosen_on_samples_that_neither_fit_nor_test_saw(folder):
    """Its score again: the mean square on the held-out samples, with the teacher's ends."""
    results = json.loads((folder / "run.json").read_text())["results"]
    model, cell = mixture(0), results["problems"]["mixture 0"]["euler|5|fit-mean"]
    x = noise(model.shape, range(8), 80.0, stream="holdout", dtype=torch.float64)
    warm = noise(model.shape, range(8), 80.0, stream="bench warm-up", dtype=torch.float64)
    found = gits.search(model, warm, 5, solver=Euler(), method="fit", objective="mean", holdout=x)
    assert cell["mean held-out"] == pytest.approx(found.error[5].rms.value ** 2 * 48, rel=1e-6)


def made(values):
    """Notes and errors of a problem with one cell, each method with a constant error."""
    names = {f"euler|5|{name}": value for name, value in values.items()}
    cells = {name: {"mean held-out": value, "calls": 60.0} for name, value in names.items()}
    return cells, {name: torch.full((9,), float(value)) for name, value in names.items()}


def test_wins_and_misses_are_counted():
    found = []
    for i, fit in enumerate((1, 3, 5)):  # below all four; below two; below none
        values = {"gits": 2, "polynomial": 4, "logsnr": 4, "quadratic": 2.5, "fit": fit}
        cells, errors = made({**values, "fit-mean": 1, "weights": 1, "weights-mean": 1})
        found.append((errors, {"problem": f"mixture {i}", "cells": cells}))
    results = results_of(found)
    group = results["mixtures"]["cells"]["euler|5"]
    assert group["wins"]["fit"]["rms"] == {"gits": 1, "polynomial": 2, "logsnr": 2, "quadratic": 1, "all": 1}
    assert group["wins"]["weights"]["median"]["all"] == 3
    assert group["methods"]["fit"]["rms"] == 3
    short = {"gits": 1, "polynomial": 2, "logsnr": 2, "quadratic": 1}
    assert results["mixtures"]["misses"] == [
        {"cell": "euler|5", "method": "fit", "measure": measure, "wins": short} for measure in ("rms", "median")
    ]
    assert results["best"]["5"]["mixture 2"]["ratio"] == 2.0
    assert "| euler, 5 | fit | rms | gits 1, polynomial 2, logsnr 2, quadratic 1 |" in tables(results)


def test_a_stopped_comparison_goes_on(tmp_path, monkeypatch, folder):
    """What is left is done with the ends that the first block found."""
    config = dataclasses.replace(TINY, solvers=("euler",), calls=(5,))
    work = bench._Bench.work

    def stops(self, text, found):
        if text:
            raise KeyboardInterrupt
        return work(self, text, found)

    monkeypatch.setattr(bench._Bench, "work", stops)
    with pytest.raises(KeyboardInterrupt):
        compare(config, tmp_path / "run")
    monkeypatch.setattr(bench._Bench, "work", work)
    monkeypatch.setattr(bench, "RK4", None)
    said = []
    resumed = compare(config, tmp_path / "run", say=said.append)
    assert said == ["resuming: 1 parts are there already"]
    one, other = (read_tensors(f / "errors.safetensors")[0] for f in (resumed, folder))
    assert torch.equal(one["mixture 0|euler|5|fit"], other["mixture 0|euler|5|fit"])
    assert "mixture 0|ends" not in one


def test_the_command_says_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(SchedulesConfig, "quick", classmethod(lambda cls: TINY))
    told = fanal("bench", "schedules", "--quick", "--out", tmp_path / "run")
    assert told.exit_code == 0, told.output
    assert (tmp_path / "run" / "tables.md").read_text() in told.stdout
