"""Ways to take the same steps: in pieces, in several processes, in a lower precision, and with several averages."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fanal.averaging import profiles
from fanal.datasets import Data
from fanal.errors import FanalError
from fanal.nets import UNetConfig, load_model, read_card
from fanal.objectives import LogNormal
from fanal.optimization import TrainingState
from fanal.processes import Processes, join, launched
from fanal.recipes import Recipe, change
from fanal.training import train

CPU = torch.device("cpu")
NET = UNetConfig(widths=(8, 16), factor=1, embedding=8, augment_dim=9)
BASE = Recipe("photos", NET, 8, batch=12, conditional=True, label_dropout=0.2, held_out_count=8, augment=0.3)
EVERYTHING = dataclasses.replace(
    BASE,
    net=dataclasses.replace(NET, dropout=0.2),
    accumulate=3,
    flip=True,
    ema=("power:0.1", 0.9, "power:0.05"),
    precision="bf16",
)


class Photos:
    """Forty 8x8 images of noise in two classes."""

    name, shape, verdicts, classes, broken_kinds = "photos", (3, 8, 8), (), ("a", "b"), {}

    def data(self, split="train", count=None, seed=0):
        generator = torch.Generator().manual_seed(int(split != "train"))
        x = torch.rand(count or 40, 3, 8, 8, generator=generator) * 2 - 1
        return Data(x, torch.arange(len(x)) % 2)


def start(recipe, processes=CPU):
    return TrainingState.start(recipe, Photos(), None, processes)


def gradient(recipe):
    """The gradient of the first step, before it is clipped."""
    run = start(dataclasses.replace(recipe, clip=1e9))
    for weight in run.model.parameters():  # at the start most of the network is silent
        weight.data.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    loss = run.step()
    return loss, {name: p.grad for name, p in run.model.named_parameters()}


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def far(a, b):
    """The largest difference, relative to the largest value."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a) / max(float(v.abs().max()) for v in a.values())


# Pieces


@pytest.mark.parametrize("accumulate", [2, 3, 5, 12])
def test_pieces_give_the_gradient_of_the_whole_batch(accumulate):
    loss, whole = gradient(BASE)
    pieces_loss, pieces = gradient(dataclasses.replace(BASE, accumulate=accumulate))
    assert pieces_loss == pytest.approx(loss, rel=1e-5)
    assert far(whole, pieces) < 1e-5
    _, other = gradient(dataclasses.replace(BASE, seed=1))
    assert far(whole, other) > 1e-2


@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 9))
def test_every_place_in_the_batch_belongs_to_one_piece(batch, accumulate, count):
    if accumulate * count > batch:
        return
    recipe = dataclasses.replace(BASE, batch=batch, accumulate=accumulate)
    state = TrainingState.__new__(TrainingState)
    places = []
    for rank in range(count):
        state.recipe, state.processes = recipe, Processes(CPU, rank, count)
        pieces = list(state.pieces())
        assert len(pieces) == accumulate
        assert all(piece.stop > piece.start for piece in pieces)
        places += [k for piece in pieces for k in range(piece.start, piece.stop)]
    assert places == list(range(batch))


def test_more_pieces_than_samples_are_refused():
    with pytest.raises(FanalError, match="12 cannot be accumulated in 13 pieces"):
        dataclasses.replace(BASE, accumulate=13)
    with pytest.raises(FanalError, match="shared by 4 processes in 6 pieces"):
        start(dataclasses.replace(BASE, accumulate=6), Processes(CPU, 0, 4))


# Precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_takes_about_the_same_steps(precision):
    full, low = start(BASE), start(dataclasses.replace(BASE, precision=precision))
    losses = [(full.step(), low.step()) for _ in range(8)]
    assert [b for _, b in losses] == pytest.approx([a for a, _ in losses], rel=0.03)
    assert [b for _, b in losses] != [a for a, _ in losses]  # it is another precision
    assert all(p.dtype == torch.float32 for p in low.model.parameters())


def test_a_loss_scale_that_is_too_large_is_lowered_and_leaves_the_weights_alone():
    run = start(dataclasses.replace(BASE, precision="fp16"))
    for _ in range(3):
        run.step()
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**60})
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.step()
    assert all(torch.equal(before[name], p) for name, p in run.model.named_parameters())
    assert run.scaler.get_scale() == 2.0**59
    stored = {name: tensor.clone() for name, tensor in run.tensors()}
    assert {float(v) for name, v in stored.items() if name.startswith("adam.steps.")} == {3.0}
    stored["losses"] = torch.tensor(run.losses, dtype=torch.float64)
    again = start(run.recipe)
    again.restore(stored, run.iteration, json.loads(json.dumps(run.scaler.state_dict())))
    assert again.scaler.get_scale() == 2.0**59
    for state in (run, again):
        state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 2.0**10})
        state.step()
    assert same(dict(run.model.named_parameters()), dict(again.model.named_parameters()))


def test_precisions_that_do_not_exist_are_refused():
    with pytest.raises(FanalError, match="unknown precision 'fp8'"):
        dataclasses.replace(BASE, precision="fp8")


# Averages


def test_the_averages_are_those_of_the_weights():
    recipe = dataclasses.replace(BASE, ema=("power:0.1", 0.6))
    run, name = start(recipe), "net.first.weight"
    path = []
    for _ in range(8):
        run.step()
        path.append(dict(run.model.named_parameters())[name].detach().clone())
    for profile, average in zip(profiles(recipe.ema), run.averages, strict=True):
        mean = torch.zeros_like(path[0])
        if profile.keep(0):
            mean = dict(start(recipe).model.named_parameters())[name].detach().clone()
        for i, weight in enumerate(path):
            mean = profile.keep(i) * mean + (1 - profile.keep(i)) * weight
        torch.testing.assert_close(dict(average.named_parameters())[name], mean, rtol=1e-5, atol=1e-7)


def test_several_averages_become_several_models(tmp_path):
    recipe = dataclasses.replace(BASE, ema=("power:0.1", 0.5))
    main = train(recipe, tmp_path / "run", dataset=Photos(), sample_every=0)
    beside = tmp_path / "run" / "ema" / "exponential-0.5"
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor(1.0)
    assert torch.equal(load_model(tmp_path / "run")(x, sigma), main(x, sigma))
    assert not torch.equal(load_model(beside)(x, sigma), main(x, sigma))
    card, other = read_card(tmp_path / "run"), read_card(beside)
    assert card["averages"]["power-0.1"] == {"folder": ".", "held_out_loss": card["held_out_loss"]["mean"]}
    told = card["averages"]["exponential-0.5"]
    assert told == {"folder": "ema/exponential-0.5", "held_out_loss": other["held_out_loss"]["mean"]}
    assert other["average"] == "exponential-0.5"
    only = train(dataclasses.replace(BASE, ema=0.5), tmp_path / "only", dataset=Photos(), sample_every=0)
    assert torch.equal(load_model(beside)(x, sigma), only(x, sigma))
    assert not (tmp_path / "only" / "ema").exists()
    (tmp_path / "run" / "ema" / "mine.txt").write_text("mine")
    train(dataclasses.replace(BASE, ema=0.5), tmp_path / "run", dataset=Photos(), overwrite=True)
    assert sorted(p.name for p in (tmp_path / "run" / "ema").rglob("*")) == ["exponential-0.5", "mine.txt"]


# Interruptions


@pytest.mark.parametrize(
    "recipe", [EVERYTHING, dataclasses.replace(EVERYTHING, precision="fp16")], ids=lambda r: r.precision
)
def test_stopped_and_continued_it_ends_with_the_same_bits(tmp_path, recipe):
    train(recipe, tmp_path / "whole", dataset=Photos(), sample_every=0)
    calls = []

    class Watched(LogNormal):
        def sample(self, u):
            calls.append(u)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return super().sample(u)

    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(recipe, noise_levels=Watched()), tmp_path / "cut", dataset=Photos(), sample_every=0)
    assert len(load_file(tmp_path / "cut" / "checkpoint.safetensors")["losses"]) == 3
    train(recipe, tmp_path / "cut", dataset=Photos(), sample_every=0)
    for name in (".", "ema/exponential-0.9", "ema/power-0.05"):
        assert same(weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name))


def test_the_fields_of_a_recipe_that_are_new_are_left_out_at_their_defaults():
    plain = Recipe("photos", UNetConfig(widths=(8, 16)), 8)
    described = plain.to_dict()
    assert not {"accumulate", "augment", "flip", "precision"} & described.keys()
    assert "augment_dim" not in described["net"]
    assert described["ema"] == 0.999
    assert Recipe.from_dict(described) == plain
    for recipe in (EVERYTHING, BASE):
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_values_are_changed_by_name():
    changed = change(BASE, {"net.dropout": 0.1, "noise_levels.mean": -1.0, "betas": [0.8, 0.9], "ema": "power:0.1"})
    assert (changed.net.dropout, changed.noise_levels.mean, changed.betas) == (0.1, -1.0, (0.8, 0.9))
    assert changed.ema == "power:0.1"
    assert change(BASE, {}) == BASE
    for wrong in ({"bach": 3}, {"net.widht": 3}, {"nets.width": 3}, {"net.dropout": "much"}, {"batch": 2.5}):
        with pytest.raises(FanalError):
            change(BASE, wrong)


# Processes


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = join("cpu")
    assert (alone.main, alone.count, launched()) == (True, 1, 0)
    tensor = torch.ones(3)
    assert alone.add([tensor], 2.5, 1) == [2.5, 1]
    assert torch.equal(tensor, torch.ones(3))
    assert alone.agree(lambda: 7) == 7
    with pytest.raises(FanalError, match="device 'gpu' is not to be had here"):
        join("gpu")


WORKER = """
import dataclasses, importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("modes", {here!r})
modes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(modes)
import torch
from fanal.errors import FanalError
from fanal.processes import join
from fanal.training import train

out = Path(sys.argv[1])
together = join("cpu")
assert together.count == 2 and together.main is (together.rank == 0)
sums = torch.full((2, 2), 1.0 + together.rank)
assert together.add([sums], 10.0 * together.rank) == [10.0] and sums.tolist() == [[3.0, 3.0], [3.0, 3.0]]
try:
    together.agree(lambda: (_ for _ in ()).throw(FanalError("said by the first")))
except FanalError as error:
    assert str(error) == "said by the first"
else:
    raise SystemExit("no error")

recipe = dataclasses.replace(modes.EVERYTHING, accumulate=1, precision="float32")
train(recipe, out / "two", dataset=modes.Photos(), progress=False)

calls = []

class Watched(modes.LogNormal):
    def sample(self, u):
        calls.append(u)
        if len(calls) == 3 and together.rank == 1:  # one of them is told, both stop
            os.kill(os.getpid(), signal.SIGINT)
        return super().sample(u)

try:
    train(dataclasses.replace(recipe, noise_levels=Watched()), out / "cut", dataset=modes.Photos(), progress=False)
except KeyboardInterrupt:
    assert len(calls) == 3
else:
    raise SystemExit("was not stopped")
train(recipe, out / "cut", dataset=modes.Photos(), progress=False)
print("done", together.rank, flush=True)
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    recipe = dataclasses.replace(EVERYTHING, accumulate=1, precision="float32")
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER).format(here=__file__))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split()) == ["0", "1", "done", "done"]
    # One process that cuts its batch in the same two pieces: dropout masks are drawn piece by piece.
    train(dataclasses.replace(recipe, accumulate=2), tmp_path / "one", dataset=Photos(), progress=False)
    for name in (".", "ema/exponential-0.9", "ema/power-0.05"):
        assert far(weights(tmp_path / "one" / name), weights(tmp_path / "two" / name)) < 1e-5
        assert same(weights(tmp_path / "two" / name), weights(tmp_path / "cut" / name))
    assert far(start(recipe).model.state_dict(), weights(tmp_path / "two")) > 1e-3
    assert read_card(tmp_path / "two")["processes"] == 2
    assert read_card(tmp_path / "one")["recipe"].keys() >= read_card(tmp_path / "two")["recipe"].keys()
    lines = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [8]  # only the first writes


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_gpu_takes_about_the_same_steps(precision, tmp_path):
    recipe = dataclasses.replace(BASE, precision=precision)
    near, far_ = start(BASE), start(recipe, Processes(torch.device("cuda")))
    for _ in range(8):
        assert far_.step() == pytest.approx(near.step(), rel=0.05)
    train(recipe, tmp_path / "run", dataset=Photos(), device="cuda")
    assert read_card(tmp_path / "run")["device"] == "cuda"
