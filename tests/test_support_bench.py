"""`fanal guide` and `fanal bench support`: figures against runs made by hand, fits and searches with known answers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file

import fanal as package
from fanal.bench.plans import compare
from fanal.bench.support import SupportConfig
from fanal.bench.support_cells import Grid
from fanal.bench.support_guided import busiest, deciding, placed
from fanal.bench.support_hunt import Suspect, climb, final_distance, retried, search
from fanal.bench.support_network import Drawn, network_scores, train_network
from fanal.bench.support_results import broken, exponents, failures, needed
from fanal.bench.support_studies import Sizes, nonlinear
from fanal.bench.support_tables import tables
from fanal.errors import FanalError
from fanal.guidance import ClassifierFree
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import Euler
from fanal.supports import target
from fanal.supports.command import GuideConfig, guide
from fanal.supports.targets import chain
from toys import fanal, record, refused, tiny


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    return guide(GuideConfig(scale=5.0, steps=6, count=20, block=7), tmp_path_factory.mktemp("guide") / "run")


def test_guide_measures_the_run_that_it_names(guided):
    goal, seeds = target("circle"), range(20)
    x = noise((2,), seeds, 80.0, dtype=torch.float64)
    end = package.sample(ClassifierFree(goal.part, goal.whole, 5.0), x, polynomial(6), Euler(), seeds)
    kept, told = load_file(guided / "guide.safetensors"), record(guided)
    assert torch.allclose(kept["x"], end, atol=1e-12)
    part, whole = goal.distances(end)
    assert torch.allclose(kept["part"], part, atol=1e-12)
    assert told["results"]["whole"]["worst"] == pytest.approx(float(whole.max()))
    assert told["results"]["part"]["q50"] == pytest.approx(float(torch.quantile(part, 0.5)))
    assert told["results"]["part"]["seed"] == int(part.argmax())
    assert told["network"]["per sample"] == 12  # two predictions in each of six steps
    assert kept["paths"].shape == (20, 7, 2)
    course = told["results"]["course"]["states"]["worst"]
    assert course[0] == pytest.approx(float(goal.distances(x)[0].max()))
    assert course[-1] == told["results"]["part"]["worst"]


def test_guide_does_not_depend_on_blocks(guided, tmp_path):
    other = guide(GuideConfig(scale=5.0, steps=6, count=20, block=20), tmp_path / "one")
    assert torch.equal(load_file(other / "guide.safetensors")["x"], load_file(guided / "guide.safetensors")["x"])


def test_guide_says_what_it_found(tmp_path):
    out = tmp_path / "bad"
    result = fanal("guide", "--support", "outlier", "--count", "8", "--steps", "3", "--figures", "svg", "--out", out)
    assert {path.name for path in (out / "figures").glob("*.svg")} == {"course.svg", "ends.svg"}
    assert f"farther than {record(out)['results']['near']:.3g}" in " ".join(result.output.split())
    assert result.exit_code == 0, result.output
    assert "0.0 ± " in result.output.replace("\n", " ")  # none ends on the condition
    page = (out / "report.html").read_text(encoding="utf-8")
    for word in ("three points in a row", "support of p(x|c)", "Where samples end", "On the way"):
        assert word in page


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--support", "sqare"], "square"),
        (["--process", "mariyama"], "process"),
        (["--model", "digits8", "--error", "0.1"], "not both"),
        (["--model", "digits8"], "shape"),
        (["--form", "interval", "--window", "0.1", "1"], "window of its own"),
        (["--label", "3"], "own condition"),
        (["--scale", "nan"], "finite"),
        (["--seed", "2000000"], "seed must be in"),
        (["--count", "1000001"], "count must be in"),
    ],
)
def test_guide_refuses(options, word, tmp_path):
    refused(fanal("guide", "--count", "4", "--steps", "3", *options, "--out", tmp_path / "no"), word)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_guide_refuses_errors_that_are_no_shares(value):
    with pytest.raises(FanalError, match="error must be"):
        GuideConfig(error=value)


@pytest.mark.parametrize(("form", "word"), [("classifier-free", "away from"), ("negative", "towards")])
def test_guide_says_where_a_negative_scale_leads(form, word, tmp_path):
    """Away from the condition, and off the support, as the theory has it; twice negated, towards it."""
    out = tmp_path / "run"
    result = fanal("guide", "--form", form, "--scale", "-3", "--count", "8", "--steps", "40", "--out", out)
    assert result.exit_code == 0, result.output
    assert f"the scale is negative: it leads {word} the condition" in " ".join(result.output.split())
    assert (record(out)["results"]["whole"]["worst"] > 0.1) == (form == "classifier-free")


def test_guide_takes_a_trained_model(tmp_path):
    tiny(tmp_path / "model", shape=(1, 8, 8), classes=10)
    config = GuideConfig(
        support="digits8", label=3, model=str(tmp_path / "model"), scale=2.0, steps=3, count=4, window=(0.1, 5.0)
    )
    out = guide(config, tmp_path / "run")
    x = load_file(out / "guide.safetensors")["x"]
    bare = package.load(str(tmp_path / "model"))
    told = package.load(str(tmp_path / "model"), labels=3)
    start = noise((1, 8, 8), range(4), 80.0)
    end = package.sample(ClassifierFree(told, bare, 2.0, (0.1, 5.0)), start, polynomial(3), Euler(), range(4))
    torch.testing.assert_close(x, end, rtol=1e-4, atol=1e-4)
    assert target("digits8", 3).distances(x)[0].tolist() == pytest.approx(
        load_file(out / "guide.safetensors")["part"].tolist(), rel=1e-6
    )


def test_the_comparison_measures_and_goes_on_where_it_was(tmp_path):
    few = Grid(scales=(1.0, 30.0), steps=(3,))
    sizes = dataclasses.replace(Sizes.quick(), count=6, grid=few, limit=few)
    config = SupportConfig(studies=("grid", "limit", "noise", "interval"), sizes=sizes)

    def stop(items, what):
        for i in items:
            if i == 2:
                raise KeyboardInterrupt
            yield i

    with pytest.raises(KeyboardInterrupt):
        compare(config, tmp_path / "run", progress=stop)
    heard = []
    out = compare(config, tmp_path / "run", say=heard.append)
    assert heard == ["resuming: 2 blocks are there already"]
    told = record(out)["results"]
    goal = target("circle")
    x = noise((2,), range(6), 80.0, dtype=torch.float64)
    end = package.sample(ClassifierFree(goal.part, goal.whole, 30.0), x, polynomial(3), Euler())
    cell = next(cell for cell in told["cells"]["grid"] if cell["scale"] == 30)
    assert cell["whole"]["worst"] == pytest.approx(float(goal.distances(end)[1].max()))
    assert cell["calls"] == 6
    assert {row["guided"] for row in told["interval"][0]["rows"]} >= {"everywhere", "nowhere", "nonlinear interval"}
    own = {row["guided"]: row for row in told["interval"][0]["rows"]}
    assert own["everywhere"]["error"]["value"] == 0
    assert own["nowhere"]["calls"] == 40
    assert own["everywhere"]["calls"] == 80
    assert "Steps that are needed" in (out / "tables.md").read_text(encoding="utf-8")


def test_the_comparison_knows_its_data_by_their_bytes(tmp_path):
    """Images that were changed do not go on with an old run; without a study of them they do not matter."""
    from PIL import Image

    for shade, name in enumerate(("left", "right")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(2):
            Image.new("L", (4, 4), 40 * k + 99 * shade).save(tmp_path / "set" / name / f"{k}.png")
    grid = Grid(targets=("circle", f"folder:{tmp_path / 'set'}:1"), scales=(2.0,), steps=(3,))
    sizes = dataclasses.replace(Sizes.quick(), count=4, targets=grid)
    config = SupportConfig(studies=("targets",), sizes=sizes)
    compare(config, tmp_path / "run")
    told = record(tmp_path / "run")
    assert [cell["target"] for cell in told["results"]["cells"]["targets"]] == list(grid.targets)
    before = config.plan().identity
    assert list(before) == [f"folder:{tmp_path / 'set'}"]
    Image.new("L", (4, 4), 200).save(tmp_path / "set" / "left" / "0.png")
    assert config.plan().identity != before
    assert dataclasses.replace(config, studies=("noise",)).plan().identity == {}


def cell(**own):
    plain = {"target": "circle", "form": "classifier-free", "process": "ddim", "score": "exact", "scale": 1.0,
             "steps": 20}  # fmt: skip
    fine = {"q50": 0.0, "q90": 0.0, "q99": 0.0, "worst": 0.0, "off": {"value": 0.0, "se": 0.1, "n": 9}}
    return {**plain, "part": fine, "whole": fine, **own}


def test_exponents_are_those_that_distances_were_made_with():
    """`w·δ` below a bend and `δ²·w³` above it; what exact scores decide and what blew up tells nothing."""

    def distance(delta, scale, steps):
        return 4.0 * (delta * scale if delta < 0.02 else delta**2 * scale**3) * (1 / steps) ** 0.25

    def made(score, far, **own):
        return cell(score=score, part={"q50": 0, "q90": far, "q99": far, "worst": far}, **own)

    places = [(d, w, n) for d in (0.003, 0.01, 0.03, 0.1) for w in (1.0, 3.0) for n in (10, 40)]
    cells = [made(f"error:{d}", distance(d, w, n), scale=w, steps=n) for d, w, n in places]
    cells += [made("error:0.3", 4e5, scale=w, steps=n) for w in (1.0, 3.0) for n in (10, 40)]
    cells += [made("exact", 3e-3, steps=10), made("exact", 1e-9, steps=40), made("exact", 1e-9, scale=3.0, steps=40)]
    found = exponents(cells)
    delta = {(row["scale"], row["steps"], row["delta"]): (row["to"], row["value"]) for row in found["delta"]}
    assert delta[3.0, 40, 0.003] == (0.01, pytest.approx(1.0))
    assert delta[3.0, 40, 0.03] == (0.1, pytest.approx(2.0))
    assert delta[3.0, 40, 0.1] == (0.3, None)  # blown up
    assert delta[1.0, 10, 0.003] == (0.01, None)  # exact scores end a third as far
    scale = {(row["delta"], row["steps"]): row["value"] for row in found["scale"]}
    assert (scale[0.01, 40], scale[0.1, 40]) == (pytest.approx(1.0), pytest.approx(3.0))
    step = {(row["delta"], row["scale"]): row["value"] for row in found["step"]}
    assert step[0.03, 3.0] == pytest.approx(0.25)
    text = tables({"cells": {}, "exponents": found})
    assert "| in δ, 40 steps: w | δ 0.003 to 0.01 |" in text
    assert "| 3 | 1.00 |" in text
    assert "from 10 to 40 steps" in text


def test_failures_are_counted_by_what_they_break():
    off = {"q50": 9.0, "q90": 9.0, "q99": 9.0, "worst": 9.0, "off": {"value": 0.5, "se": 0.1, "n": 9}}
    assert broken(cell()) == ()
    assert broken(cell(scale=30.0)) == ("step size",)
    assert broken(cell(scale=30.0, steps=1000)) == ()
    every = cell(score="error:0.1", process="maruyama", target="outlier")
    assert broken(every) == ("exact scores", "exponential integrator", "support geometry")
    assert broken(cell(process="sde2")) == ("order 1",)
    rows = {
        tuple(row["broken"]): row for row in failures([cell(), cell(process="maruyama", whole=off), cell(steps=30)])
    }
    assert (rows[()]["cells"], rows[()]["failing"]) == (2, 0)
    assert (rows[("exponential integrator",)]["failing"], rows[("exponential integrator",)]["worst"]) == (1, 9.0)


def test_steps_needed_are_those_after_the_last_failure():
    shares = {10: 0.5, 20: 0.0, 40: 0.1, 80: 0.0, 160: 0.0}
    off = {n: {**cell()["part"], "off": {"value": share, "se": 0.1, "n": 9}} for n, share in shares.items()}
    rows = needed([cell(steps=n, part=part) for n, part in off.items()] + [cell(process="eta2", steps=10)])
    assert [(row["process"], row["from"]) for row in rows] == [("ddim", 80), ("eta2", 10)]


def test_the_nonlinear_interval_is_where_a_path_turns():
    """A straight way in, a quarter of a circle, a straight way out."""
    corner = torch.linspace(0, math.pi / 2, 21, dtype=torch.float64)
    turn = torch.stack([corner.sin(), 1 - corner.cos()], 1)
    ways = torch.linspace(0.2, 3, 10, dtype=torch.float64)
    into = torch.stack([-ways.flip(0), torch.zeros(10)], 1)
    out = torch.stack([torch.ones(10), 1 + ways], 1)
    path = torch.cat([into, turn, out])[:, None]
    sigmas = torch.arange(len(path), 0, -1, dtype=torch.float64)
    low, high = nonlinear(path, sigmas)
    assert float(sigmas[30]) - 1 <= low <= float(sigmas[28])
    assert float(sigmas[12]) <= high <= float(sigmas[10]) + 1
    with pytest.raises(FanalError, match="straight"):
        nonlinear(into[:, None], sigmas[:10])


def test_the_deciding_window_is_where_predictions_part():
    sigmas = torch.cat([package.schedules.logsnr(40, 0.01, 100.0, zero=False), torch.zeros(1).double()])
    middle = sigmas[:-1].log().abs() < 1.0
    low, high = deciding(middle.double(), sigmas, (0.05, 0.95))
    assert math.exp(-1.3) < low < math.exp(-0.6)
    assert math.exp(0.6) < high < math.exp(1.3)


def test_the_critical_window_holds_the_steps_with_most_hits():
    hits = t(0.0, 0.1, 0.3, 0.4, 0.2, 0.1, 0.0, 0.0)
    assert busiest(hits, 3) == 2
    assert busiest(torch.ones(8), 3) == 0
    sigmas = torch.cat([torch.arange(8, 0, -1), torch.zeros(1)]).double()
    windows = placed(3, 2, sigmas)
    assert windows == {"critical": (4.0, 5.0), "first": (7.0, 8.0), "above": (6.0, 7.0), "below": (2.0, 3.0)}
    assert placed(6, 2, sigmas)["below"] == (1.0, 2.0)  # nothing is left below
    assert placed(1, 2, sigmas)["above"] == (7.0, 8.0)


def suspect():
    corners = t([-0.8, -0.3], [-0.2, 0.4], [0.3, -0.1], [0.9, 0.5])
    return Suspect(corners, 1, 2, t(0.4, -0.9), 4.0, 0.0)


def test_final_distances_have_the_gradients_that_differences_give():
    own, step = suspect(), 1e-6

    def value(corners, unit, scale):
        goal = chain("chain", corners, 1, 2, "")
        # at five steps, stopped above 0: the last step would project onto the support
        denoiser = ClassifierFree(goal.part, goal.whole, scale)
        x = 80 * unit[None]
        for transition in package.trace(denoiser, x, polynomial(5, 0.5, 80.0, zero=False), Euler()):
            x = transition.step.x_next
        return (x - goal.whole.project(x)).norm()

    corners, unit, scale = own.corners.requires_grad_(), own.unit.requires_grad_(), t(4.0).requires_grad_()
    value(corners, unit, scale).backward()
    with torch.no_grad():
        for tensor in (corners, unit, scale):
            assert tensor.grad is not None
            for k in range(tensor.numel()):
                ends = []
                for sign in (1, -1):
                    moved = tensor.detach().clone()
                    moved.view(-1)[k] += sign * step
                    parts = [moved if each is tensor else each for each in (corners, unit, scale)]
                    ends.append(float(value(*parts)))
                assert float(tensor.grad.view(-1)[k]) == pytest.approx(
                    (ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-6
                )


def test_climbing_ends_farther_and_is_told_as_it_is():
    found, every, scales = search(4, 16, 3, Euler(), seed=5)
    assert len(every) == len(scales) == 64
    assert float(scales[every.argmax()]) == found[0].scale
    assert found[0].distance == pytest.approx(float(every.max()))
    start = found[0]
    best = climb(start, 3, Euler(), iterations=6)
    assert best.distance >= start.distance
    goal = best.goal()
    with torch.no_grad():
        again = float(final_distance(goal, 80 * best.unit[None], best.scale, 3, Euler())[0] / goal.size)
    assert again == pytest.approx(best.distance, rel=1e-9)
    told = retried(best, 3, Euler(), 0.01)
    assert told["finer"][3] == pytest.approx(best.distance, rel=1e-9)
    assert set(told["finer"]) == {3, 6, 12, 24, 48, 96, 192}


def test_a_network_learns_the_points_of_a_target():
    goal = target("circle")
    drawn = Drawn(goal).data("train", 600)
    assert drawn.labels is not None
    assert float((drawn.labels == 0).double().mean()) == pytest.approx(1 / 3, abs=0.08)  # 4 standard errors
    assert float(goal.part.distance(drawn.x[drawn.labels == 0].double()).max()) < 1e-6
    assert float(goal.part.distance(drawn.x[drawn.labels == 1].double()).min()) > 1e-6
    x, level = noise((2,), range(64), 1.4, dtype=torch.float64), t(1.0)[0]
    right, errors = goal.part(x, level), []
    for iterations in (1, 150):
        scores = network_scores(goal, train_network(goal, iterations))
        errors.append(float((scores.told(x, level) - right).square().mean()))
    assert errors[1] < 0.5 * errors[0]
    assert not torch.equal(scores.told(x, level), scores.free(x, level))
    with pytest.raises(FanalError, match="drawn"):
        Drawn(target("outlier"))


@pytest.mark.parametrize(
    ("own", "word"),
    [
        ({"studies": ()}, "nothing to do"),
        ({"studies": ("hnut",)}, "hunt"),
        ({"studies": ("hallucination",)}, "--model"),
        ({"samples": 2}, "at least 8"),
        ({"near": 0.0}, "positive"),
    ],
)
def test_comparisons_that_cannot_be_made_are_refused(own, word):
    with pytest.raises(FanalError, match=word):
        SupportConfig(**own)


def test_guided_hallucination_needs_a_model_with_classes_and_a_rule():
    for model in ("grid2", "digits8"):
        with pytest.raises(FanalError, match="class labels"):
            SupportConfig(studies=("hallucination",), model=model).plan()


def test_guided_hallucination_counts_wrong_samples_on_the_same_noise(tmp_path):
    """On a network of random weights: calls by setting, every sample judged, changes that are differences of rates."""
    card = {"recipe": {"data": "shapes32"}}
    tiny(tmp_path / "model", shape=(1, 32, 32), classes=7, card=card)
    config = SupportConfig(studies=("hallucination",), model=str(tmp_path / "model"), samples=8, steps=8)
    run = compare(config, tmp_path / "run")
    told = record(run)["results"]["hallucination"]
    rows = {(row["scale"], row["where"]): row for row in told["rows"]}
    windows = ("critical", "first", "above", "below")
    assert set(rows) == {(0.0, "everywhere"), (1.0, "everywhere")} | {
        (scale, where) for scale in (2.0, 4.0, 8.0) for where in ("everywhere", *windows, "core")
    }
    for scale in (0.0, 1.0):
        assert rows[scale, "everywhere"]["evaluations"] == 8
    assert rows[4.0, "everywhere"]["evaluations"] == 16
    assert all(rows[4.0, where]["evaluations"] == 10 for where in windows)  # a quarter of the steps: equally many
    plain = rows[1.0, "everywhere"]["wrong"]["value"]
    for (scale, _), row in rows.items():
        assert row["n"] == 8
        assert sum(row["verdicts"]) == 8
        wrong, whole = row["wrong"]["value"], rows[scale, "everywhere"]["wrong"]["value"]
        assert wrong - plain == pytest.approx(row["change"]["value"])
        assert wrong - whole == pytest.approx(row["against everywhere"]["value"])
        assert row["served"]["value"] <= min(row["asked"]["value"], 1 - wrong)
        served = rows[1.0, "everywhere"]["served"]["value"] + row["served change"]["value"]
        assert row["served"]["value"] == pytest.approx(served)
        assert row["diversity"]["coverage"]["ratio"] is None or scale != 1 or row["diversity"]["coverage"]["ratio"] == 1
    assert sum(told["index"]["largest"]) == 8
    assert "critical: steps" in (run / "tables.md").read_text(encoding="utf-8")
    kept = load_file(run / "errors.safetensors")
    assert float((kept["w 4|first|verdict"] != 0).double().mean()) == rows[4.0, "first"]["wrong"]["value"]
    assert len(kept) == 2 * len(rows)


def test_the_page_of_a_guided_run_is_written_again(guided):
    before = (guided / "report.html").read_text(encoding="utf-8")
    (guided / "report.html").unlink()
    assert fanal("report", guided).exit_code == 0
    assert (guided / "report.html").read_text(encoding="utf-8") == before
