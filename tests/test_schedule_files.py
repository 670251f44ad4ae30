"""Schedule files: what is written is read back, what is none is refused, and each consumer runs what was exported."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import fanal as package
import schedule_content
from fanal import gits
from fanal.config import build_schedule, build_solver
from fanal.errors import FanalError
from fanal.loading import load
from fanal.schedule_files import Schedules, completed, entries_of, read_schedules, write_schedules
from fanal.schedule_search import Weighted
from fanal.schedule_search.command import draw
from fanal.schedules import logsnr, polynomial
from fanal.solvers import Euler, Heun
from schedule_content import ERROR, ROWS, content, denoiser, noisy
from toys import fanal, part_of, record, refused

# Fixtures
here = schedule_content.here
path = schedule_content.path


def test_what_is_written_is_read_back(tmp_path):
    kept = content(ROWS)
    write_schedules(tmp_path / "a.json", kept)
    found = read_schedules(tmp_path / "a.json")
    assert (found.model, found.search) == ("hands32", {"method": "fit", "seed": 0})
    for steps, entry in kept.entries.items():
        other = found.entries[steps]
        assert torch.equal(other.sigmas, entry.sigmas)  # every bit
        assert (other.solver, other.calls, other.weights, other.start) == ("euler", steps, entry.weights, "gits-dev")
        assert other.error.median == ERROR.median
        assert math.isnan(other.error.rms.se)


def test_a_search_becomes_a_file_with_counted_calls(tmp_path):
    found = gits.search(denoiser(), noisy(80.0), [2, 3], solver=Heun(), teacher=Heun(), method="fit", iterations=1)
    entries = entries_of(found, "heun")
    assert {k: entry.calls for k, entry in entries.items()} == {2: 4, 3: 6}
    assert entries[2].error == found.error[2]
    assert entries[3].start == found.picks[3]


@pytest.mark.parametrize("method", ["gits", "fit-weights"])
def test_an_analytical_first_step_goes_into_the_file(tmp_path, method):
    found = gits.search(denoiser(), noisy(80.0), 2, solver=Euler(), teacher=Euler(), afs=True, method=method)
    write_schedules(tmp_path / "a.json", Schedules("m", entries_of(found, "euler")))
    kept = read_schedules(tmp_path / "a.json")
    assert (kept.entries[3].calls, kept.entries[3].solver) == (2, "afs:solver=euler")
    assert build_solver(str(tmp_path / "a.json")) == found.solver_for(2)


def test_a_free_first_step_is_not_counted_when_a_grid_is_asked_for(tmp_path):
    found = gits.search(denoiser(), noisy(80.0), [2, 3], solver=Euler(), teacher=Euler(), afs=True)
    write_schedules(tmp_path / "a.json", Schedules("m", entries_of(found, "euler")))
    kept = read_schedules(tmp_path / "a.json")
    for steps in (2, 3):
        assert torch.equal(kept.entry(steps).sigmas, found.schedules[steps])
    assert torch.equal(kept.entry(4).sigmas, found.schedules[3])  # nothing was asked for with 4: its intervals count
    with pytest.raises(FanalError, match="grids of 2, 3 steps, not of 5"):
        kept.entry(5)


def test_a_run_takes_from_its_file_what_was_not_given(path, tmp_path):
    plain = tmp_path / "plain.json"
    plain.write_text("[3, 2, 1]", encoding="utf-8")
    assert completed(str(path), None, None) == (str(path), 4)  # the most steps of 3 and 4
    assert completed(str(path), "heun", 3) == ("heun", 3)
    for other in (None, "polynomial:rho=5", str(plain)):
        assert completed(other, None, None) == ("euler", 40)


def test_the_command_line_takes_a_file_as_schedule_and_as_solver(tmp_path, path):
    sigmas = build_schedule(str(path), 4, 0.002, 80.0)
    assert torch.equal(sigmas, polynomial(4, 0.01, 50.0, zero=False))
    assert build_solver(str(path)) == Euler()
    write_schedules(tmp_path / "w.json", content(ROWS))
    solver = build_solver(str(tmp_path / "w.json"))
    ran = package.sample(denoiser(), noisy(), polynomial(3, 0.01, 50.0, zero=False), solver)
    assert torch.equal(ran, package.sample(denoiser(), noisy(), polynomial(3, 0.01, 50.0, zero=False), Weighted(ROWS)))
    with pytest.raises(FanalError, match="these solvers are for 3, 4 steps, the grid has 5"):
        package.sample(denoiser(), noisy(), logsnr(5), solver)


def test_a_file_is_for_the_steps_and_the_range_it_has(path, tmp_path):
    with pytest.raises(FanalError, match="grids of 3, 4 steps, not of 40: pass --steps"):
        build_schedule(str(path), 40, 0.002, 80.0)
    with pytest.raises(FanalError, match="searched on hands32 and runs from sigma 50 to 0.01, outside 14.6"):
        build_schedule(str(path), 3, 0.002, 14.6)
    one = Schedules("m", {3: content().entries[3]})
    write_schedules(tmp_path / "one.json", one)
    assert len(build_schedule(str(tmp_path / "one.json"), 40, 0.002, 80.0)) == 4  # the steps come from the file


def wrong(**changes):
    """A file with one grid in which something is changed."""
    row = {"steps": 2, "solver": "euler", "calls": 2, "sigmas": [2.0, 1.0, 0.5], "weights": None, "error": None}
    return {"format": "fanal-schedules-1", "model": "m", "schedules": [{**row, **changes}]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"format": "other"}, "no schedule file"),
        ({**wrong(), "schedules": []}, "list of 1 to 64 grids"),
        ({**wrong(), "schedules": [3]}, "must be an object"),
        ({**wrong(), "schedules": wrong()["schedules"] * 65}, "list of 1 to 64 grids"),
        ({**wrong(), "schedules": wrong()["schedules"] * 2}, "two grids have the same number"),
        ({**wrong(), "model": 7}, "model must be a text"),
        (wrong(sigmas=[2.0]), "list of 2 to 1001"),
        (wrong(sigmas=[1.0] * 2000), "list of 2 to 1001"),
        (wrong(sigmas=[2.0, True, 0.5]), "finite numbers"),
        (wrong(sigmas=[2.0, 1e999, 0.5]), "finite numbers"),
        (wrong(sigmas=[2.0, 3.0, 0.5]), "strictly monotone"),
        (wrong(sigmas=[0.5, 1.0, 2.0]), "must decrease"),
        (wrong(sigmas=[2.0, 1.0, -0.5]), "must be finite and >= 0"),
        (wrong(steps=3), "3 sigmas make 2 steps"),
        (wrong(calls=0), "0 calls"),
        (wrong(calls=10**9), "calls"),
        (wrong(solver=""), "solver must name one"),
        (wrong(solver="b.json"), "no other schedule file"),
        (wrong(solver=["euler"]), "solver must be a text"),
        (wrong(weights=[[1.0]]), "one list for each of the 2 steps"),
        (wrong(weights=[[1.0], [1.0, 2.0, 3.0]]), "row n with 1 to n"),
        (wrong(weights=[[1.0], ["x"]]), "row n with 1 to n"),
        (wrong(error={"median": 1}), "error must hold value"),
        (wrong(error=[1]), "error must hold median and rms"),
    ],
)
def test_what_is_no_schedule_file_is_refused(tmp_path, value, message):
    (tmp_path / "bad.json").write_text(json.dumps(value))
    with pytest.raises(FanalError, match=message) as caught:
        read_schedules(tmp_path / "bad.json")
    assert "bad.json" in str(caught.value)


def test_an_unread_file_names_itself(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "none.json"):
        with pytest.raises(FanalError, match=name):
            build_schedule(str(tmp_path / name), 4, 0.002, 80.0)


# The command.


SEARCH = ("schedule", "gaussian:tilted2", "--warmup", 6, "--holdout", 5, "--teacher", "euler", "--teacher-steps", 12)


def test_the_command_searches_exports_and_the_sampler_takes_its_file(here):
    told = fanal(*SEARCH, "--steps", "3,4", "--solver", "heun", "--method", "fit", "--export", "edm", "--out", "s.json")
    assert told.exit_code == 0, told.output
    assert "calls per warm-up sample: teacher 12" in told.stdout
    found = read_schedules("s.json")
    assert {k: entry.calls for k, entry in found.entries.items()} == {3: 6, 4: 8}
    assert found.entries[3].error.rms.n == 5
    assert found.search["teacher_steps"] == 12
    assert (here / "s.png").is_file()
    assert json.loads((here / "s.edm.json").read_text())["schedules"]["3"] == found.entries[3].sigmas.tolist()
    run = fanal("sample", "gaussian:tilted2", "--schedule", "s.json", "--solver", "s.json", "--steps", 3, "--count", 4)
    assert run.exit_code == 0, run.output
    kept = record(here / "fanal-sample")
    assert kept["network"]["evaluations"] == 4 * 6
    assert kept["results"]["sigmas"] == found.entries[3].sigmas.tolist()


def test_the_command_equals_the_library(here):
    told = fanal(
        *SEARCH, "--steps", "3", "--method", "fit-weights", "--solver", "euler", "--seed", 3, "--out", "s.json"
    )
    assert told.exit_code == 0, told.output
    model, grid = package.load("gaussian:tilted2"), polynomial(12, zero=False)
    found = gits.search(
        model, 6, 3, solver=Euler(), method="fit-weights", sigmas=grid, teacher=Euler(), seed=3, holdout=5
    )
    entry = read_schedules("s.json").entries[3]
    assert torch.equal(entry.sigmas, found.schedules[3])
    assert entry.weights == found.weights[3]
    assert entry.error == found.error[3]


def test_several_solvers_compete_for_the_calls(here):
    told = fanal(*SEARCH, "--steps", "4", "--solver", "euler+heun", "--method", "fit", "--out", "s.json")
    assert told.exit_code == 0, told.output
    found = read_schedules("s.json")
    (entry,) = found.entries.values()
    assert entry.calls == 4
    assert entry.solver in ("euler", "heun")
    assert f"4 calls: {entry.solver}" in told.stdout
    assert set(found.search["scores"]["4"]) == {"euler", "heun", "euler, fitted", "heun, fitted"}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--steps", "3,x"], ["whole numbers with commas"]),
        (["--steps", "0"], ["at least 1"]),
        (["--steps", "13"], ["room for 1 to 12"]),
        (["--solver", "hoin"], ["unknown solver"]),
        (["--method", "fit-weights", "--export", "edm"], ["--method fit"]),
        (["--method", "fit-weights", "--solver", "heun"], ["no multistep weights"]),
        (["--export", "edn"], ["did you mean 'edm'"]),
        (["--out", "s.txt"], ["ends in .json"]),
        (["--metric", "l3"], ["unknown metric"]),
    ],
)
def test_what_the_command_cannot_do_is_one_line(here, words, parts):
    assert refused(fanal(*SEARCH, "--steps", "3", *words), *parts)
    assert list(here.iterdir()) == []


def test_nothing_is_replaced_unasked(here):
    (here / "s.png").write_text("mine")
    assert refused(fanal(*SEARCH, "--steps", "3", "--out", "s.json"), "s.png exists", "--overwrite")
    assert (here / "s.png").read_text() == "mine"
    assert fanal(*SEARCH, "--steps", "3", "--out", "s.json", "--overwrite").exit_code == 0
    assert not part_of(here / "s.json").exists()


@pytest.mark.parametrize("afs", [(), ("--afs",)])
def test_a_run_needs_no_more_than_its_schedule_file(here, afs):
    """Its solver, and its grid with the most steps; the free step of an analytical start is not counted."""
    assert fanal(*SEARCH, "--steps", "3,4", "--solver", "heun", *afs, "--out", "s.json").exit_code == 0
    for words, steps in (((), 4), (("--steps", 3), 3)):
        told = fanal("sample", "gaussian:tilted2", "--schedule", "s.json", *words, "--count", 4, "--out", f"run{steps}")
        assert told.exit_code == 0, told.output
        assert "was searched" not in told.stdout
        kept, entry = record(f"run{steps}"), read_schedules("s.json").entry(steps)
        assert kept["network"]["calls"] == entry.calls
        assert kept["results"]["sigmas"] == entry.sigmas.tolist()
    assert read_schedules("s.json").entry(4).steps == (5 if afs else 4)


def test_the_picture_has_a_dot_for_each_node():
    from fanal.pictures import COLORS

    wanted = tuple(int(COLORS["flag"][i : i + 2], 16) for i in (1, 3, 5))
    image = np.array(draw({3: logsnr(3, zero=False), 5: logsnr(5, zero=False)}))
    for steps, y in ((3, 8 + 17), (5, 8 + 34 + 17)):
        dots = (image[y] == wanted).all(1)
        assert int((np.diff(dots.astype(int)) == 1).sum()) == steps + 1


def test_budgets_with_as_many_steps_are_told_apart(tmp_path, monkeypatch):
    """A file has one grid for each number of steps: the nearer one stays, and the other is named."""
    monkeypatch.chdir(tmp_path)
    words = ("--warmup", 4, "--holdout", 4, "--teacher-steps", 8, "--method", "fit", "--out", "two.json")
    told = fanal("schedule", "mixture:ring8", "--solver", "heun+dpm2", "--steps", "4,5", *words)
    assert told.exit_code == 0, told.output
    assert set(read_schedules(tmp_path / "two.json").entries) == {2}
    assert "calls: not in the file, which keeps one grid of 2 steps, the nearer one" in told.stdout
    assert refused(fanal("schedule", "mixture:ring8", "--solver", "heun+dpm2", "--coeff", 1.2), "leave them out")
    assert refused(fanal("schedule", "mixture:ring8", "--holdout", 2), "at least 3 held-out samples")


def test_warm_up_noise_goes_where_the_model_is():
    assert gits._drawn(load("mixture:ring8"), 3, 80.0, 0, "meta").device.type == "meta"


def test_a_file_names_no_other_file(tmp_path, path):
    value = json.loads(path.read_text(encoding="utf-8"))
    for entry in value["schedules"] if isinstance(value["schedules"], list) else value["schedules"].values():
        entry["solver"] = "afs:solver=(a.json)"
    other = tmp_path / "a.json"
    other.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(FanalError, match="no other schedule file"):
        read_schedules(other)


def test_a_schedule_of_another_model_or_solver_is_told(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = read_schedules(path)
    steps = min(found.entries)
    words = ("sample", "mixture:grid2", "--steps", steps, "--count", 2, "--schedule", path)
    told = fanal(*words, "--solver", "heun", "--out", "a")
    assert told.exit_code == 0, told.output
    assert f"was searched on {found.model}, not on mixture:grid2" in told.stdout
    assert f"was searched for {found.entries[steps].solver}, not for heun" in told.stdout
    assert "not for" not in fanal(*words, "--solver", path, "--out", "b").stdout
