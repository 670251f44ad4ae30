"""`generate`: the same seeds give the same bits, however it is cut, interrupted or resumed, and every call counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

import fanal as library
import generated
from fanal import generation
from fanal.errors import FanalError, NonFiniteError
from fanal.generation import SampleConfig, generate
from fanal.hallucination import LastSlope, Redo, Renoise, watch
from fanal.hallucination.calibration import HINTS
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import Churn, Euler, Heun
from fanal.trajectory import Trajectory
from generated import SMALL, Stop
from toys import blurred, logged, part_of, read_log, record, same, samples, tiny

# Fixtures
the_toys_count_only_where_asked = generated.the_toys_count_only_where_asked
net = generated.net


def test_a_run_is_the_library_calls_it_stands_for(tmp_path):
    folder = generate(dataclasses.replace(SMALL, block=22), tmp_path / "run")
    seeds, grid = range(2_000_000, 2_000_022), polynomial(8)
    x = library.sample(library.load("mixture:grid2"), noise((2,), seeds, 80.0), grid, Euler(), seeds)
    found = samples(folder)
    assert torch.equal(found["x"], x)
    risk = watch(library.load("mixture:grid2"), noise((2,), seeds, 80.0), grid, Euler(), LastSlope(), seeds).risk
    assert torch.equal(found["risk"], risk)
    assert torch.equal(found["verdict"], library.datasets.DATASETS["grid2"].verify(x))
    told = record(folder)
    assert told["seeds"] == {"first": 2_000_000, "count": 22}
    assert told["results"]["sigmas"] == grid.tolist()
    assert SampleConfig(**{**told["config"], "guard": tuple(told["config"]["guard"])}) == dataclasses.replace(
        SMALL, block=22
    )
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "run.json", "samples.png", "samples.safetensors"]


def test_repairs_are_the_library_calls_they_stand_for(tmp_path):
    config = dataclasses.replace(SMALL, block=22, guard=("redo", "renoise"), flag=0.3)
    folder = generate(config, tmp_path / "run")
    found, told = samples(folder), record(folder)["results"]
    seeds, grid, model = config.seeds(), polynomial(8), library.load("mixture:grid2")
    x, eye = noise((2,), seeds, 80.0), LastSlope()
    assert told["calibration"]["detector"] == "last_slope"
    assert told["repairs"]["redo"]["kappa"] == HINTS["grid2"]["repair"]["redo"]["kappa"]
    first = watch(model, x, grid, Euler(), eye, seeds)
    threshold = told["calibration"]["threshold"]
    assert torch.equal(found["before"], first.x)
    assert torch.equal(found["flagged"].bool(), first.risk > threshold)
    assert told["flagged"] == int((first.risk > threshold).sum()) > 0
    redone = Redo(0.1, (0.1, 4.0)).repair(model, x, grid, Euler(), eye, seeds, first, threshold)
    again = Renoise(1.5, 4).repair(model, x, grid, Euler(), eye, seeds, first, threshold)
    assert torch.equal(found["x"], redone.x)
    assert torch.equal(found["x.renoise"], again.x)
    assert torch.equal(found["rounds.renoise"], again.rounds)
    assert torch.equal(found["evaluations.redo"], redone.evaluations)


def test_the_table_counts_what_the_verdicts_say(tmp_path):
    config = dataclasses.replace(SMALL, steps=5, count=60, guard=("redo",), flag=0.4)
    folder = generate(config, tmp_path / "run")
    found, rows = samples(folder), {row["name"]: row for row in record(folder)["results"]["table"]}
    before, after = found["verdict"] != 0, found["verdict.redo"] != 0
    assert int((before & ~after).sum()) > 0
    assert int((after & ~before).sum()) > 0  # or the shares below could not be told apart
    assert rows["plain"]["wrong"]["value"] == float(before.double().mean())
    assert rows["redo"]["wrong"]["value"] == float(after.double().mean())
    assert rows["redo"]["corrected"]["value"] == int((before & ~after).sum()) / int(before.sum())
    assert rows["redo"]["change"]["value"] == pytest.approx(float((after.double() - before.double()).mean()))
    assert rows["redo"]["corrected"]["n"] == int(before.sum())
    assert rows["redo"]["newly_wrong"]["value"] == int((after & ~before).sum()) / 60
    assert rows["redo"]["evaluations"]["value"] == pytest.approx(float(found["evaluations.redo"].mean()))
    real = library.datasets.DATASETS["grid2"].data("held out", 1000).x
    assert rows["redo"]["spread"]["value"] == library.metrics.spread(found["x"], real).value
    assert rows["plain"]["spread"]["value"] == library.metrics.spread(found["before"], real).value


def test_the_seconds_of_a_repair_include_the_run_before_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FANAL_TEST_SLEEP", "0.02")
    config = dataclasses.replace(SMALL, model="python:toys:logged", steps=4, block=22, guard=("redo",), flag=0.4)
    told = record(generate(config, tmp_path / "run"))
    assert told["results"]["flagged"] > 0
    plain, redo = (row["seconds"]["value"] * 22 for row in told["results"]["table"])
    assert plain >= 4 * 0.02
    assert redo >= plain + 4 * 0.02
    assert told["seconds"] == pytest.approx(redo, rel=1e-5)


def test_the_order_of_guards_says_which_gives_the_samples(tmp_path):
    config = dataclasses.replace(SMALL, guard=("redo", "renoise"))
    one = samples(generate(config, tmp_path / "one"))
    two = samples(generate(dataclasses.replace(config, guard=("renoise", "redo")), tmp_path / "two"))
    assert torch.equal(one["x"], two["x.redo"])
    assert torch.equal(two["x"], one["x.renoise"])
    assert torch.equal(one["before"], two["before"])


def test_the_page_says_what_the_record_says(tmp_path):
    folder = generate(SMALL, tmp_path / "run")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"<dt>torch version</dt><dd>{torch.__version__}</dd>" in page
    library.report.write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == page


def test_the_order_in_which_blocks_are_computed_is_irrelevant(tmp_path):
    whole = samples(generate(SMALL, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        generate(SMALL, tmp_path / "cut", progress=Stop(4))
    for lost in (0, 2):  # now 1 and 3 come before 0, 2 and 4
        (part_of(tmp_path / "cut") / f"block-{lost:06d}.safetensors").unlink()
    assert same(samples(generate(SMALL, tmp_path / "cut")), whole)


@pytest.mark.parametrize("model", ["mixture:grid2", "gaussian:tilted2"])
@pytest.mark.parametrize("solver", [Euler(), Heun(), Churn()])
@pytest.mark.parametrize("guard", [None, Redo(), Renoise(sigma=1.5)])
def test_another_block_size_changes_a_closed_form_by_rounding_only(model, solver, guard):
    denoiser, grid = library.load(model), polynomial(20)
    results = []
    for block in (24, 7, 1):
        parts = []
        for begin in range(0, 24, block):
            seeds = range(begin, min(begin + block, 24))
            x = noise((2,), seeds, 80.0, dtype=torch.float64)
            outcome = watch(denoiser, x, grid, solver, LastSlope(), seeds)
            if guard is not None:
                outcome = guard.repair(denoiser, x, grid, solver, LastSlope(), seeds, outcome, 0.02)
            parts.append(outcome.x)
        results.append(torch.cat(parts))
    scale = results[0].abs().max()
    for other in results[1:]:
        assert float((other - results[0]).abs().max() / scale) <= 1e-12


def test_another_block_size_of_a_run_changes_rounding_only(tmp_path, net):
    for model in ("mixture:grid2", net):
        config = dataclasses.replace(SMALL, model=model)
        one = samples(generate(config, tmp_path / "one", overwrite=True))["x"]
        two = samples(generate(dataclasses.replace(config, block=9), tmp_path / "two", overwrite=True))["x"]
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_samples_and_another_shares_no_noise(tmp_path):
    first = samples(generate(SMALL, tmp_path / "a"))
    torch.randn(7)
    assert same(first, samples(generate(SMALL, tmp_path / "b")))
    other = samples(generate(dataclasses.replace(SMALL, seed=3), tmp_path / "c"))["x"]
    assert not (first["x"][:, None] == other[None]).all(2).any()
    starts = [noise((2,), dataclasses.replace(SMALL, seed=seed).seeds()) for seed in (0, 1, 2, 3)]
    values = torch.cat(starts).flatten()
    assert len(values.unique()) == len(values)


def test_more_samples_begin_with_the_same_ones(tmp_path):
    few = samples(generate(dataclasses.replace(SMALL, count=10), tmp_path / "few"))["x"]
    many = samples(generate(dataclasses.replace(SMALL, count=20), tmp_path / "many"))["x"]
    assert torch.equal(few, many[:10])


@pytest.mark.parametrize("solver", ["euler", "heun", "churn:s_churn=20", "ddpm"])
@pytest.mark.parametrize("guard", [(), ("redo", "renoise")])
def test_the_calls_that_are_told_are_the_calls_that_were_made(tmp_path, monkeypatch, solver, guard):
    monkeypatch.setenv("FANAL_TEST_LOG", str(tmp_path / "log"))
    config = dataclasses.replace(SMALL, model="python:toys:logged", solver=solver, guard=guard)
    told = record(generate(config, tmp_path / "run"))
    made = read_log(tmp_path / "log")
    network = told["network"]
    assert made["evaluations"] == network["evaluations"] + network["calibration"]
    if not guard:
        assert made["calls"] == network["calls"]
        each = 8 if solver in ("euler", "ddpm") else 15
        assert network == {"calls": 5 * each, "evaluations": 22 * each, "calibration": 0}
    by_sample = samples(tmp_path / "run")
    plain = by_sample["evaluations"].sum()
    repaired = sum(float(by_sample[f"evaluations.{name}"].sum() - plain) for name in guard)
    assert float(plain) + repaired == network["evaluations"]
    table = {row["name"]: row for row in told["results"]["table"]}
    assert table["plain"]["evaluations"]["value"] * 22 == pytest.approx(float(plain))


@pytest.mark.parametrize(("guidance", "each"), [(None, 1), (1.0, 1), (0.0, 1), (2.5, 2)])
def test_guidance_asks_for_both_halves_in_one_call(tmp_path, net, guidance, each):
    config = dataclasses.replace(SMALL, model=net, label=1, guidance=guidance)
    told = record(generate(config, tmp_path / "run"))
    assert told["network"] == {"calls": 5 * 8, "evaluations": 22 * 8 * each, "calibration": 0}
    assert (samples(tmp_path / "run")["evaluations"] == 8 * each).all()


def test_a_trajectory_is_the_one_that_was_run(tmp_path):
    folder = generate(dataclasses.replace(SMALL, trajectory=True), tmp_path / "run")
    kept = Trajectory.load(folder / "trajectory.safetensors")
    assert kept.seeds == tuple(SMALL.seeds())
    assert torch.equal(kept.sigmas, polynomial(8))
    assert torch.equal(kept.x[0], noise((2,), SMALL.seeds(), 80.0))
    assert torch.equal(kept.x[-1], samples(folder)["x"])
    truth = library.load("mixture:grid2")
    assert torch.allclose(kept.denoised[5], truth(kept.x[5], kept.sigmas[5]))
    plain = samples(generate(SMALL, tmp_path / "plain"))
    assert same(plain, samples(folder))  # watching more closely changes nothing


@pytest.mark.parametrize(
    ("change", "grid"),
    [
        ({"sigma_min": 0.01}, polynomial(8, sigma_min=0.01)),
        ({"sigma_max": 40.0}, polynomial(8, sigma_max=40.0)),
        ({"zero": False}, polynomial(8, zero=False)),
        ({"steps": 3, "schedule": "polynomial:rho=3"}, polynomial(3, rho=3)),
    ],
)
def test_the_grid_is_the_one_that_was_asked_for(tmp_path, change, grid):
    config = dataclasses.replace(SMALL, **change)
    told = record(generate(config, tmp_path / "run"))
    assert told["results"]["sigmas"] == grid.tolist()


def test_one_step_is_enough_to_run_and_to_watch(tmp_path):
    folder = generate(dataclasses.replace(SMALL, steps=1), tmp_path / "run")
    assert record(folder)["network"]["evaluations"] == 22


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": 0}, "count must be in"),
        ({"count": 1_000_001}, "count must be in"),
        ({"block": 0}, "at least 1"),
        ({"threads": 0}, "at least 1"),
        ({"seed": -1}, "seed must be in"),
        ({"guard": ("rods",)}, "unknown guard 'rods'"),
        ({"guard": ("redo", "redo")}, "each guard can be given once"),
        ({"flag": 1.0}, "strictly between 0 and 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, words):
    with pytest.raises(FanalError, match=words):
        dataclasses.replace(SMALL, **change)


def test_threads_are_set_for_the_run_and_put_back(tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(
        generation, "_work", lambda *a, work=generation._work: seen.append(torch.get_num_threads()) or work(*a)
    )
    told = record(generate(dataclasses.replace(SMALL, threads=before + 1), tmp_path / "run"))
    assert set(seen) == {before + 1}
    assert told["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_nan_names_the_step_the_sigma_and_the_seed(tmp_path):
    config = dataclasses.replace(SMALL, model="python:toys:nan")
    grid = polynomial(8)
    step = next(i for i, sigma in enumerate(grid.tolist()) if sigma < 1)
    with pytest.raises(NonFiniteError) as caught:
        generate(config, tmp_path / "run")
    assert f"step {step} of 8" in str(caught.value)
    assert f"sigma {float(grid[step]):.6g}" in str(caught.value)
    assert "[2000001]" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_toy_that_counts_is_the_closed_form():
    x = noise((2,), range(5), 3.0)
    sigma = torch.tensor(3.0, dtype=torch.float64)
    assert torch.equal(logged()(x, sigma), library.load("mixture:grid2")(x, sigma))
    assert not torch.equal(blurred()(x, sigma), library.load("mixture:grid2")(x, sigma))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_with_guards_works_on_an_accelerator(tmp_path):
    tiny(tmp_path / "model")
    config = dataclasses.replace(SMALL, model=str(tmp_path / "model"), guard=("redo", "renoise"), trajectory=True)
    here = samples(generate(config, tmp_path / "cpu"))
    there = samples(generate(dataclasses.replace(config, device="cuda"), tmp_path / "gpu"))
    assert torch.allclose(here["before"], there["before"], atol=1e-2)
    assert there["risk"].dtype == torch.float64


def test_each_class_in_turn_and_repairs_keep_them(tmp_path, net):
    """Sample b is of class b modulo their number, in the run, in its repairs and whatever the block size."""
    config = dataclasses.replace(SMALL, model=net, label="each", guidance=2.0, guard=("redo",), flag=0.5)
    told, again = (samples(generate(dataclasses.replace(config, block=b), tmp_path / f"{b}")) for b in (5, 22))
    classes = library.load(net).denoiser.classes
    x = noise((1, 8, 8), config.seeds(), 80.0)
    model = library.load(net, labels=[b % classes for b in range(22)], guidance=2.0)
    grid = polynomial(config.steps)
    assert torch.allclose(told["before"], library.sample(model, x, grid, Euler()), atol=1e-5)
    assert torch.allclose(told["x"], again["x"], atol=1e-5)
    flagged = told["flagged"].bool()
    assert 0 < flagged.sum() < 22
    cool = library.Temperature(model, 6 / 32, (0.8, 25.0))
    redone = library.sample(cool, x, grid, Euler())
    assert torch.allclose(told["x"][flagged], redone[flagged], atol=1e-5)
    assert torch.equal(told["x"][~flagged], told["before"][~flagged])


def test_latents_are_kept_with_their_pictures(tmp_path):
    """Samples that a model can decode come with uint8 images, before and after a repair, and those are drawn."""
    config = dataclasses.replace(SMALL, model="python:toys:decoding", guard=("redo", "renoise"), flag=0.5)
    run = generate(config, tmp_path / "run")
    told = samples(run)
    for x, image in (("before", "image.before"), ("x", "image"), ("x.renoise", "image.renoise")):
        wanted = ((told[x][:, 0] / 5).clamp(-1, 1) + 1) * 127.5
        assert told[image].dtype == torch.uint8
        assert told[image].shape == (22, 1, 4, 4)
        assert torch.equal(told[image][:, 0, 2, 3], wanted.round().to(torch.uint8))
    assert Image.open(run / "samples.png").size != (512, 512)  # no scatter plot of the latents


def test_a_jump_ends_the_run_at_its_denoised_prediction(tmp_path):
    run = generate(dataclasses.replace(SMALL, jump=1.0), tmp_path / "run")
    whole = polynomial(8, sigma_min=library.load(SMALL.model).sigma_min)
    cut = library.schedules.jump(whole, 1.0)
    assert record(run)["results"]["sigmas"] == cut.tolist()
    assert 2 < len(cut) < len(whole)
    model = library.Counted(library.load(SMALL.model).denoiser)
    x = noise((2,), SMALL.seeds(), 80.0)
    assert torch.allclose(samples(run)["x"], library.sample(model, x, cut, Euler()), atol=1e-5)
    assert record(run)["network"]["evaluations"] == model.evaluations == 22 * (len(cut) - 1)


def test_schedule_files_inside_a_solver_are_part_of_the_identity(tmp_path, monkeypatch):
    """A file that a nested solver names decides the numbers as much as one that is named alone."""
    monkeypatch.chdir(tmp_path)
    network = library.load("mixture:grid2").denoiser
    seen = set()
    for text in ("one", "two"):
        (tmp_path / "b.json").write_text(text, encoding="utf-8")
        for solver in ("b.json", "rods:solver=(b.json)", "afs:solver=b.json"):
            found = generation.identity(SampleConfig("mixture:grid2", solver=solver), network)
            seen.add((solver, found["solver"]))
    assert len(seen) == 6
    assert "solver" not in generation.identity(SampleConfig("mixture:grid2", solver="heun"), network)
