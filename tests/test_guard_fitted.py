"""`fanal guard` with detectors that are fitted: the ladder's judge from labels, the shipped probe, combinations."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import fanal as library
import generated
from fanal.calibration_files import read_calibration
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.files import read_tensors
from fanal.generation import generate
from fanal.guarding import guard
from fanal.hallucination import Ladder, combination, probe, watch
from fanal.hallucination.calibration import FIRST_SEED
from fanal.hallucination.detectors import Combined, LastSlope, SlopeChange, build
from fanal.hallucination.hints import HINTS
from fanal.labeling import open_labels, read_samples
from fanal.preparation import SampleConfig
from fanal.schedules import polynomial
from fanal.solvers import Euler
from generated import Stop
from toys import fanal, record, refused, same, samples

SMALL = SampleConfig("mixture:grid2", steps=8, count=22, block=22, seed=2, guard=("ladder",), calibrate=64)
RUNGS = "ladder:rungs=1.5/3..4/4,accept=0.3,flag=0.4"


# Fixtures
elsewhere = generated.elsewhere
net = generated.net


@pytest.fixture
def labelled(net):
    """A run of 36 samples, 30 of them labelled: the brighter half is wrong."""
    base = dataclasses.replace(SMALL, model=net, guard=(), count=36, block=12, label="each")
    folder = generate(base, "earlier")
    x, labels = samples(folder)["x"], open_labels(read_samples(folder), "faces")
    light = x.flatten(1).mean(1)
    for b in range(30):
        labels.set(b, int(light[b] > light[:30].median()))
    return dataclasses.replace(base, seed=5, guard=(RUNGS,), labels=str(labels.path), count=22, block=11)


def test_a_ladder_with_nobody_to_judge_says_what_to_do(net, tmp_path):
    words = ("--steps", 5, "--count", 6, "--calibrate", 16, "--repair", "ladder", "--out", "run")
    told = ["needs labelled samples", "fanal label first", "--labels first/labels.json", "--detector variance"]
    assert refused(fanal("guard", net, *words), *told)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FanalError, match=r"--detector combined needs .*combined:file=FILE"):
        guard(dataclasses.replace(SMALL, model=net, guard=("none",), detector="combined"), "run")
    with pytest.raises(FanalError, match="fanal guard does that"):
        generate(dataclasses.replace(SMALL, model=net, guard=(), detector="probe"), "run")
    free = guard(dataclasses.replace(SMALL, model=net, detector="variance"), "free")  # a free detector judges
    assert int(samples(free)["rounds.ladder"].max()) >= 1


def test_the_ladder_climbs_by_a_probe_of_a_persons_labels(labelled):
    """The run is the library's own calls: the fit, its threshold, the ladder."""
    folder = guard(labelled, "run")
    found, told = samples(folder), record(folder)
    known = told["results"]["calibration"]
    earlier, model = samples("earlier")["x"], library.load(labelled.model, labels=[b % 3 for b in range(30)])
    wrong = earlier[:30].flatten(1).mean(1) > earlier[:30].flatten(1).mean(1).median()
    fit = probe.fit(model, earlier[:30], wrong)
    kept = read_calibration(folder)
    assert kept.calibration.probe is not None
    assert torch.equal(kept.calibration.probe.weight, fit.probe.weight)
    assert torch.equal(kept.risk, fit.risk)
    assert known["threshold"] == float(fit.risk.quantile(0.6))  # the ladder's own share
    assert known["auc"] == pytest.approx(fit.auc.value)
    assert told["network"]["calibration"] == 30 * 2
    assert told["results"]["threshold_from"] == f"the labels {labelled.labels}"
    x, own = [], library.load(labelled.model)
    for some in (range(11), range(11, 22)):
        bound = library.load(labelled.model, labels=[b % 3 for b in some])
        seeds = [labelled.seeds()[b] for b in some]
        start = library.noise(own.shape, seeds, 80.0)
        first = watch(bound, start, polynomial(8), Euler(), fit.probe, seeds)
        assert torch.equal(found["before"][some.start : some.stop], first.x)
        ladder = Ladder(((1.5, 3), (4.0, 4)), accept=(0.3,), flag=0.4)
        x.append(ladder.repair(bound, start, polynomial(8), Euler(), fit.probe, seeds, first, known["threshold"]).x)
    assert torch.equal(found["x"], torch.cat(x))
    assert 0 < int(found["flagged"].sum()) < 22
    assert bool((found["evaluations"] == 8 + 2).all())


def test_a_judge_goes_with_its_calibration_file(labelled):
    first = samples(guard(labelled, "first", save="judge.json"))
    taken = dataclasses.replace(labelled, labels=None, calibration="judge.json")
    again = guard(taken, "again")
    assert same(samples(again), first)
    assert record(again)["network"]["calibration"] == 0
    named = dataclasses.replace(labelled, labels=None, detector="probe:file=judge.probe.safetensors", guard=("none",))
    with pytest.raises(FanalError, match="judge.probe.safetensors"):
        guard(dataclasses.replace(named, detector="probe:file=away/judge.probe.safetensors"), "no")
    told = record(guard(named, "named"))["results"]["calibration"]
    assert told["first_seed"] == FIRST_SEED + 2**20  # it may have been fitted on those before
    other = probe.read("judge.probe.safetensors")
    probe.write("judge.probe.safetensors", dataclasses.replace(other, bias=other.bias + 1))
    with pytest.raises(FanalError, match="is not the probe that judge.json was measured with"):
        guard(taken, "no")
    Path("judge.probe.safetensors").unlink()
    with pytest.raises(FanalError, match="judge.probe.safetensors"):
        guard(taken, "no")
    value = json.loads(Path("judge.json").read_text(encoding="utf-8"))
    with pytest.raises(FanalError, match="no set of options"):
        library.hallucination.Calibration.from_dict(value["calibration"]).build()


def test_an_interrupted_run_goes_on_with_the_judge_that_it_had(labelled):
    whole = samples(guard(labelled, "whole"))

    with pytest.raises(KeyboardInterrupt):
        guard(labelled, "cut", progress=Stop(1))
    assert same(samples(guard(labelled, "cut")), whole)


def test_a_combination_of_labelled_samples_watched_again(labelled):
    told = []
    config = dataclasses.replace(labelled, detector="combined:parts=variance+last_slope", guard=("none",))
    folder = guard(config, "run", say=told.append)
    assert "watching its 36 samples again" in told[0]
    assert record(folder)["network"]["calibration"] == 36 * 8
    detector = read_calibration(folder).calibration.build()
    assert isinstance(detector, Combined)
    assert [type(part.detector).__name__ for part in detector.parts] == ["Variance", "LastSlope"]
    assert 0 < float(samples(folder)["risk"].min()) < float(samples(folder)["risk"].max()) < 1
    # a linear probe needs no watching: it judges the labelled samples themselves, by whatever run they came
    more = dataclasses.replace(labelled, guard=("none",), detector="probe:strength=0.1")
    judge = guard(more, "more", say=told.append) / "calibration.probe.safetensors"
    again = guard(dataclasses.replace(more, detector=f"probe:file={judge}"), "again", say=told.append)
    assert len(told) == 1
    assert record(again)["network"]["calibration"] == 30 * 2
    fitted, x = probe.read(judge), samples("earlier")["x"][:30]
    wanted = fitted.judge(library.load(labelled.model, labels=[b % 3 for b in range(30)]), x)
    assert torch.allclose(read_calibration(again).risk, wanted, atol=1e-4)  # in other blocks


def test_a_combination_is_fitted_to_what_a_rule_knows_and_kept():
    parts = {"last_slope": LastSlope(), "slope_change": SlopeChange((0.0, 2.0))}
    config = dataclasses.replace(
        SMALL, guard=("none",), detector="combined:parts=last_slope+slope_change", calibrate=96, steps=5
    )
    folder = guard(config, "run", save="two.json")
    assert "It needs no network call" in (folder / "report.html").read_text(encoding="utf-8")
    kept = read_calibration("two.json")
    assert isinstance(kept.calibration.build(), Combined)
    assert kept.calibration.first_seed == FIRST_SEED
    assert same(samples(guard(dataclasses.replace(config, detector=None, calibration="two.json"), "again")),
                samples(folder))  # fmt: skip
    seen = library.hallucination.observation.observe(
        library.load("mixture:grid2"), polynomial(5), Euler(), parts, range(200),
        verify=library.datasets.get("grid2").verify,
    )  # fmt: skip
    combination.save("own.json", combination.fit(parts, seen.risks, seen.wrong).detector)
    own = guard(dataclasses.replace(config, detector="combined:file=own.json"), "own")
    assert read_calibration(own).calibration.build() == combination.load("own.json")
    with pytest.raises(FanalError, match="cannot read .*none.json"):
        guard(dataclasses.replace(config, detector="combined:file=none.json"), "no")


def test_options_of_a_detector_reach_the_run():
    text = "rods_index:v=score,over=max,window=0.1..3"
    told = record(guard(dataclasses.replace(SMALL, guard=("none",), detector=text, calibrate=16), "run"))["results"]
    assert told["detector"] == json.loads(json.dumps(told["detector"]))
    assert (told["detector"]["window"], told["detector"]["options"]["v"]) == ([0.1, 3.0], "score")
    assert build("rods_index", (0.1, 3.0), v="score", over="max") == read_calibration("run").calibration.build()


def test_the_shipped_probe_judges_the_embedded_hands():
    """Its threshold is of seeds that it was not fitted to, its rungs are the data's; what the card lacks is told."""
    told = []
    config = SampleConfig(
        "hands32", steps=6, count=6, block=6, calibrate=8, guard=("ladder", "redo"), flag=0.3, threads=1
    )
    folder = guard(config, "run", say=told.append)
    assert told[0].startswith(
        "the card's calibration does not fit (grid 40 steps from sigma 80 to 0 there, 6 steps from sigma 80 to 0 here; "
        "detector "
    )
    assert "probe here; share to flag 0.35 there, 0.3 here)" in told[0]
    found = record(folder)["results"]
    assert found["calibration"]["first_seed"] == FIRST_SEED + 2**20
    assert found["repairs"]["ladder"]["rungs"] == HINTS["hands32"]["repair"]["ladder"]["rungs"]
    counted = Counted(library.load("hands32"))
    own = probe.shipped(counted)
    assert own is not None
    kept = read_calibration(folder).calibration.probe
    assert kept is not None
    assert torch.equal(kept.weight, own.weight)
    assert kept.threshold(0.3) == pytest.approx(found["calibration"]["threshold"])
    assert torch.allclose(own.judge(counted, samples(folder)["before"]), samples(folder)["risk"], atol=1e-4)
    shutil.copy(probe.SHIPPED / "shapes32.safetensors", "s.safetensors")
    with pytest.raises(FanalError, match="fitted to the network"):
        guard(dataclasses.replace(config, detector="probe:file=s.safetensors"), "no")
    assert "probe" not in read_tensors(folder / "samples.safetensors")[0]
