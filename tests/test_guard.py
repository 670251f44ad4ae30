"""`fanal guard`: the threshold's origin, repairs and files, on models with a verifier and without one."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import edm_files
import fanal as library
import generated
from fanal import flagging
from fanal.calibration_files import FORMAT, Saved, read_calibration, write_calibration
from fanal.errors import FanalError
from fanal.generation import generate
from fanal.guarding import guard
from fanal.hallucination import Renoise, calibrate, watch
from fanal.hallucination.detectors import build, last_window
from fanal.labeling import open_labels, read_samples
from fanal.preparation import SampleConfig, settings_of
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import Euler
from toys import fanal, record, refused, same, samples, tiny

SMALL = SampleConfig("mixture:grid2", steps=8, count=22, block=22, seed=2, guard=("redo",), calibrate=64)


# Fixtures
elsewhere = generated.elsewhere
net = generated.net
the_toys_count_only_where_asked = generated.the_toys_count_only_where_asked


def test_the_threshold_is_the_one_that_calibrate_finds(tmp_path):
    """Block by block or at once, the same risks; the run's flags are those of the library."""
    folder = guard(dataclasses.replace(SMALL, flag=0.25), "run")
    told = record(folder)["results"]
    grid, model = polynomial(8), library.load("mixture:grid2")
    wanted = calibrate(
        model, grid, Euler(), "last_slope", last_window(grid), solver_name="euler", count=64, block=22, flag=0.25
    )
    assert told["calibration"]["threshold"] == wanted.threshold
    assert told["threshold_from"] == "calibration seeds"
    assert record(folder)["command"] == "guard"
    assert record(folder)["network"]["calibration"] == 64 * 8
    first = watch(
        model, noise((2,), SMALL.seeds(), 80.0), grid, Euler(), build("last_slope", (0.0, 0.0)), SMALL.seeds()
    )
    assert torch.equal(samples(folder)["flagged"].bool(), first.risk > wanted.threshold)


def test_a_model_without_verifier_is_scored_flagged_and_repaired(net):
    config = dataclasses.replace(SMALL, model=net, guard=("renoise:sigma=6,rounds=2", "fresh"), flag=0.4)
    folder = guard(config, "run")
    found, told = samples(folder), record(folder)
    flagged = found["flagged"].bool()
    assert 0 < int(flagged.sum()) < 22
    assert found["per_step"].shape == (22, 8)
    assert torch.equal(found["per_step"][:, -1], found["risk"])
    for name, rounds in (("renoise", 2), ("fresh", 1)):
        assert bool((found[f"rounds.{name}"][~flagged] == 0).all())
        assert bool((found[f"rounds.{name}"][flagged] >= 1).all())
        assert int(found[f"rounds.{name}"].max()) <= rounds
        assert bool((found[f"evaluations.{name}"] >= found["evaluations"]).all())
    assert torch.equal(found["x"][~flagged], found["before"][~flagged])
    assert "verdict" not in found
    assert {p.name for p in folder.iterdir()} == {
        *("run.json", "samples.safetensors", "samples.png", "report.html", "calibration.json")
    }
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "calibration samples exceeded" in page
    assert told["results"]["calibration"]["auc"] is None
    one = Image.open(guard(dataclasses.replace(config, guard=("none",)), "none") / "samples.png")
    both = Image.open(folder / "samples.png")
    assert both.height == one.height
    assert both.width > 2 * one.width  # before beside after


def test_no_repair_is_the_plain_run_with_flags():
    plain = samples(generate(dataclasses.replace(SMALL, guard=()), "plain"))
    flagged = samples(guard(dataclasses.replace(SMALL, guard=("none",)), "flagged"))
    assert "before" not in flagged
    assert same({k: v for k, v in flagged.items() if k != "flagged"}, plain)
    assert 0 < int(flagged["flagged"].sum()) < 22


def test_a_saved_calibration_needs_no_calibration_and_gives_the_same_bits(net, monkeypatch):
    config = dataclasses.replace(SMALL, model=net, label="each")
    first = samples(guard(config, "first", save="c.json"))
    asked = []
    monkeypatch.setattr(flagging, "_watch", lambda *a: asked.append(a))
    told = []
    again = guard(dataclasses.replace(config, calibration="c.json"), "again", say=told.append)
    assert same(samples(again), first)
    assert asked == told == []
    assert record(again)["network"]["calibration"] == 0
    assert record(again)["results"]["threshold_from"] == "the calibration c.json"
    assert same(samples(guard(dataclasses.replace(config, calibration="first"), "folder")), first)
    for share in (0.1, 0.5):  # the file keeps the risks, so another share costs nothing
        other = guard(dataclasses.replace(config, calibration="c.json", flag=share), f"share{share}")
        risk = read_calibration("c.json").risk
        assert record(other)["results"]["calibration"]["threshold"] == float(torch.quantile(risk, 1 - share))
    guard(dataclasses.replace(config, calibration="c.json", label=1), "other", say=told.append)
    assert told == ["c.json was calibrated with label 'each', this run has 1"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "mixture:ring8"}, "was calibrated on mixture:grid2, which is not mixture:ring8"),
        ({"solver": "heun"}, "with euler on 8 steps .* has heun on 8 steps"),
        ({"steps": 9}, "8 steps from sigma 80 to 0; this run has euler on 9 steps"),
        ({"catch": 0.5}, None),
    ],
)
def test_a_calibration_holds_for_its_model_solver_and_grid(change, words):
    guard(SMALL, "first", save="c.json")
    config = dataclasses.replace(SMALL, calibration="c.json", **change)
    if words is None:  # grid2 has a rule, so the file knows which risks were of wrong samples
        saved = read_calibration("c.json")
        assert saved.wrong is not None
        assert int(saved.wrong.sum()) > 1
        limit = record(guard(config, "second"))["results"]["calibration"]["threshold"]
        assert float((saved.risk[saved.wrong] > limit).double().mean()) >= 0.5
        assert float((saved.risk[saved.wrong] > math.nextafter(limit, math.inf) + 1e-12).double().mean()) < 0.5
        return
    with pytest.raises(FanalError, match=words):
        guard(config, "second")
    assert sorted(p.name for p in Path().iterdir()) == [
        "c.json",
        "first",
    ]


def test_an_interrupted_calibration_goes_on_block_by_block(net, monkeypatch):
    """Blocks that are there are not watched again, and the numbers are those of a run without a stop."""
    config = dataclasses.replace(SMALL, model=net, block=16)
    whole = samples(guard(config, "whole"))

    with pytest.raises(KeyboardInterrupt):
        guard(config, "cut", progress=generated.Stop(3, "calibrating"))
    counted = []
    real = flagging.watch
    monkeypatch.setattr(flagging, "watch", lambda *a, **k: counted.append(1) or real(*a, **k))
    assert same(samples(guard(config, "cut")), whole)
    assert len(counted) == 1  # of 4 blocks
    assert not list(Path("cut").glob("*-0*"))


def test_a_run_is_watched_again(tmp_path, net):
    """The same seeds and conditions as the run, its samples bit for bit; what is given on the command line wins."""
    words = ("--steps", 6, "--count", 9, "--block", 4, "--label", "each", "--guidance", 1.5, "--solver", "heun")
    assert fanal("sample", net, *words, "--seed", 3, "--out", "earlier").exit_code == 0
    told = fanal("guard", net, "--run", "earlier", "--repair", "none", "--calibrate", 16, "--out", "again")
    assert told.exit_code == 0, told.output
    assert "the samples are those of earlier, bit for bit" in told.stdout
    config = record("again")["config"]
    assert (config["steps"], config["count"], config["label"], config["guidance"]) == (6, 9, "each", 1.5)
    assert (config["solver"], config["seed"], config["block"]) == ("heun", 3, 4)
    assert torch.equal(samples("again")["risk"], samples("earlier")["risk"])
    more = fanal("guard", net, "--run", "earlier", "--count", 12, "--calibrate", 16, "--out", "more")
    assert "earlier has 9 samples, 12 were watched" in more.stdout
    other = tmp_path / "other"
    tiny(other, shape=(1, 8, 8), classes=3, seed=1)
    assert refused(fanal("guard", other, "--run", "earlier", "--out", "no"), "was sampled from", "is not that model")
    assert refused(fanal("guard", net, "--run", "nowhere", "--out", "no"), "nowhere is not a run folder")
    assert settings_of("earlier")["guidance"] == 1.5
    assert "guard" not in settings_of("again")


def test_noise_of_ones_own():
    """Scored from a file's unit noise: the seeds' own noise in a file gives the seeds' own run."""
    unit = noise((2,), SMALL.seeds(), math.inf)
    save_file({"noise": unit}, "n.safetensors")
    mine = samples(guard(dataclasses.replace(SMALL, noise="n.safetensors"), "mine"))
    assert torch.allclose(mine["before"], samples(guard(SMALL, "theirs"))["before"], atol=1e-5)
    save_file({"noise": unit[:5]}, "few.safetensors")
    save_file({"x": unit}, "x.safetensors")
    for name, words in (("few", "has noise for 5 samples, 22 are wanted"), ("x", "must hold unit noise as 'noise'")):
        with pytest.raises(FanalError, match=words):
            guard(dataclasses.replace(SMALL, noise=f"{name}.safetensors"), "no")


def label(folder, rows, wrong):
    """Label a run as its page does."""
    place = folder / "labels.json"
    place.unlink(missing_ok=True)
    labels = open_labels(read_samples(folder), "faces")
    for b in rows:
        labels.set(b, int(b in wrong))
    return str(place)


def test_labels_set_the_threshold(net, monkeypatch):
    """From the labeled run's own risks, at no call; by another detector, after watching it again."""
    base = dataclasses.replace(SMALL, model=net, guard=(), count=30, block=15)
    earlier = generate(base, "earlier")
    risk = samples(earlier)["risk"]
    rows = list(range(0, 30, 2))
    wrong = set(sorted(rows, key=lambda b: -float(risk[b]))[1:5])  # the riskiest one is right
    place = label(earlier, rows, wrong)
    config = dataclasses.replace(base, seed=5, guard=("none",), labels=place, catch=0.75)
    told = []
    found = guard(config, "run", say=told.append)
    known = record(found)["results"]["calibration"]
    third = sorted((float(risk[b]) for b in wrong), reverse=True)[2]
    assert known["threshold"] == math.nextafter(third, -math.inf)
    assert (known["caught"], known["count"], known["wrong"]) == (0.75, 15, pytest.approx(4 / 15))
    assert record(found)["network"]["calibration"] == 0
    assert told == []
    assert "labeled" in (found / "report.html").read_text(encoding="utf-8")
    assert torch.equal(samples(found)["flagged"].bool(), samples(found)["risk"] > known["threshold"])
    other = guard(dataclasses.replace(config, detector="path_length"), "other", say=told.append)
    assert "watching its 30 samples again" in told[0]
    assert record(other)["network"]["calibration"] == 30 * 8
    guard(dataclasses.replace(config, seed=2), "same", say=told.append)
    assert "of samples of this run" in told[-1]
    with pytest.raises(FanalError, match="label a run like this one"):
        guard(dataclasses.replace(config, steps=9), "no")
    with pytest.raises(FanalError, match="cannot read .*earlier/labels.json"):
        guard(dataclasses.replace(config, labels=label(earlier, [], ())), "no")
    open_labels(read_samples(earlier), "faces").set(3, None)  # unsure
    with pytest.raises(FanalError, match="holds no label yet"):
        guard(dataclasses.replace(config, labels=place), "no")


def test_a_threshold_from_labels_keeps_the_conditions_of_the_labeled_run(net):
    """Not those of the run that takes it, which are told where they are others."""
    base = dataclasses.replace(SMALL, model=net, guard=(), label="each")
    place = label(generate(base, "earlier"), range(22), {3, 7})
    told = []
    config = dataclasses.replace(base, seed=5, guard=("none",), labels=place, flag=0.2, label=1)
    found = guard(config, "run", say=told.append)
    assert told == [f"{place} was calibrated with label 'each', this run has 1"]
    assert read_calibration(found).conditions["label"] == "each"


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_rods_as_the_solver_and_the_renoise_loop_after_it(net, guidance):
    """A guard within steps and a guard between runs compose, and both with guidance: the run is the library's calls."""
    solver = "rods:product=difference,method=cas,rho=0.1,window=2..5"
    config = dataclasses.replace(SMALL, model=net, solver=solver, guard=("renoise",), count=10, block=10, flag=0.4)
    label = None if guidance is None else "each"
    found = samples(guard(dataclasses.replace(config, label=label, guidance=guidance), "run"))
    told, labels = record(Path("run")), None if guidance is None else [b % 3 for b in range(10)]
    grid, model = polynomial(8), library.load(net, labels=labels, guidance=guidance)
    inner = library.config.build_solver(solver)
    x, eye = noise((1, 8, 8), config.seeds(), 80.0), build("variance", last_window(grid))
    first = watch(model, x, grid, inner, eye, config.seeds())
    assert torch.equal(found["before"], first.x)
    limit = told["results"]["calibration"]["threshold"]
    again = Renoise().repair(model, x, grid, inner, eye, config.seeds(), first, limit)
    assert torch.equal(found["x"], again.x)
    assert not torch.equal(found["before"], library.sample(model, x, grid, Euler()))


def test_embedded_models_and_checkpoints_without_a_verifier(tmp_path):
    """digits8 has no rule; an edm file has no card at all."""
    (tmp_path / "tiny.pkl").write_bytes(edm_files.tiny_pickle())
    for model, label in (("digits8", "each"), ("edm:tiny.pkl", "each"), ("gaussian:digits8", None)):
        config = dataclasses.replace(SMALL, model=model, label=label, steps=5, count=6, block=6, calibrate=16, flag=0.4)
        folder = guard(config, f"run-{model[:3]}")
        found, told = samples(folder), record(folder)["results"]
        assert "verdict" not in found
        assert told["detector"]["detector"] == "variance"
        assert told["calibration"]["count"] == 16
        kept = ~found["flagged"].bool()
        assert torch.equal(found["x"][kept], found["before"][kept])


def test_detectors_that_ask_are_counted(net):
    config = dataclasses.replace(SMALL, model=net, detector="jacobian", guard=("none",), calibrate=16)
    told = record(guard(config, "run"))
    plain = record(guard(dataclasses.replace(config, detector="variance"), "plain"))
    assert told["network"]["evaluations"] > plain["network"]["evaluations"]
    assert "its calls are counted with the run's" in Path("run/report.html").read_text(encoding="utf-8")
    assert "It needs no network call" in Path("plain/report.html").read_text(encoding="utf-8")


def test_latents_are_judged_as_latents_and_shown_as_pictures():
    found = samples(guard(dataclasses.replace(SMALL, model="python:toys:decoding", flag=0.5), "run"))
    assert found["image"].shape == found["image.before"].shape == (22, 1, 4, 4)
    assert found["x"].shape == (22, 2)


def test_an_infinite_threshold_changes_no_bit(net):
    """A saved calibration whose threshold nobody reaches: the guarded run is the plain one."""
    config = dataclasses.replace(SMALL, model=net)
    guard(config, "first", save="c.json")
    saved = read_calibration("c.json")
    huge = dataclasses.replace(saved.calibration, threshold=1e300)
    write_calibration("c.json", dataclasses.replace(saved, calibration=huge))
    found = samples(guard(dataclasses.replace(config, calibration="c.json", guard=("redo", "renoise")), "run"))
    plain = samples(generate(dataclasses.replace(config, guard=()), "plain"))
    for name in ("x", "before", "x.renoise"):
        assert torch.equal(found[name], plain["x"])
    assert not found["flagged"].any()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--repair", "none", "--repair", "redo"), ["none stands for no repair"]),
        (("--repair", "redoo"), ["unknown guard 'redoo'", "did you mean 'redo'"]),
        (("--flag", 0.2, "--catch", 0.5), ["set by one share, got flag and catch"]),
        (("--catch", 1.5), ["catch is a share strictly between 0 and 1"]),
        (("--detector", "varience"), ["unknown detector 'varience'", "did you mean 'variance'"]),
        (("--calibration", "none.json"), ["there is no calibration at none.json", "--save FILE"]),
        (("--calibration", "c.json", "--detector", "variance"), ["a calibration names its detector"]),
        (("--labels", "here/labels.json"), ["cannot read here/labels.json"]),
        (("--noise", "none.safetensors"), ["cannot read none.safetensors"]),
    ],
)
def test_a_mistake_costs_one_line_and_leaves_nothing(tmp_path, words, parts):
    assert refused(fanal("guard", "mixture:grid2", "--steps", 5, "--count", 6, "--calibrate", 16, *words), *parts)
    assert list(tmp_path.iterdir()) == []


def test_catching_needs_somebody_who_knows(net):
    for asked in ({"catch": 0.5}, {"alarms": 0.1}):  # told before the network is asked
        with pytest.raises(FanalError, match="nothing knows that here.*--labels"):
            guard(dataclasses.replace(SMALL, model=net, **asked), "run")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "is no calibration file"),
        ({"format": FORMAT}, "is damaged"),
        ({"risk": ["a"]}, "is damaged"),
        ({"risk": [1.0], "wrong": [True, False]}, "is damaged"),
        ({"wrong": [0]}, "is damaged"),
        ({"model": 3}, "is damaged"),
        ({"calibration": {"detector": "variance"}}, "calibrat"),
    ],
)
def test_hostile_calibration_files(tmp_path, value, words):
    grid = polynomial(3)
    found = library.hallucination.calibration.settle(
        build("variance", (0.0, 1.0)), torch.rand(9), solver_name="euler", sigmas=grid, first_seed=0
    )
    place = tmp_path / "c.json"
    write_calibration(place, Saved("m", "", found, {}, torch.rand(9)))
    assert read_calibration(place).calibration == found
    whole = json.loads(place.read_text(encoding="utf-8"))
    place.write_text(json.dumps({**whole, **value} if value and "format" not in value else value), encoding="utf-8")
    with pytest.raises(FanalError, match=words):
        read_calibration(place)
