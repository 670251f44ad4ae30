"""Training: recipes, interruptions, and how near to the truth it gets."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import load_file

import points
from fanal.datasets import Data
from fanal.errors import FanalError, NonFiniteError
from fanal.exact import Mixture
from fanal.nets import MLPConfig, UNetConfig, load_model, read_card
from fanal.objectives import LogNormal, Middle
from fanal.optimization import draw
from fanal.recipes import RECIPES, Recipe
from fanal.training import train
from points import MEANS, TINY, Blank, Points, interrupted, log, weights
from toys import same


def test_a_run_leaves_a_model_that_says_how_it_was_made(tmp_path):
    model = train(TINY, tmp_path / "run", dataset=Points(), validate_every=20)
    again = load_model(tmp_path / "run")
    x = torch.randn(7, 2)
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    assert torch.equal(model(x, torch.tensor(1.0), labels), again(x, torch.tensor(1.0), labels))
    assert again.classes == 3
    assert again.sigma_data == pytest.approx(float(Points().data(count=200).x.double().std()))
    card = read_card(tmp_path / "run")
    assert Recipe.from_dict(card["recipe"]) == TINY
    assert card["iterations"] == 60
    assert card["seconds"] > 0
    assert set(card["loss"]) == {"first_200", "last_200"}
    assert [entry["iteration"] for entry in log(tmp_path / "run")] == [20, 40, 60]
    assert log(tmp_path / "run")[-1]["held_out"] == card["held_out_loss"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "curve.png",
        "log.jsonl",
        "model.json",
        "model.safetensors",
        "samples",
    ]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    # Neither how often it stops to write nor what the process drew before matters.
    train(TINY, tmp_path / "a", dataset=Points())
    torch.rand(3)
    train(TINY, tmp_path / "b", dataset=Points(), checkpoint_every=7, validate_every=13)
    train(dataclasses.replace(TINY, seed=1), tmp_path / "c", dataset=Points())
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))
    torch.set_rng_state(state)
    before = torch.get_rng_state()
    train(TINY, tmp_path / "d", dataset=Points())
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_dropout_is_also_a_function_of_the_iteration(tmp_path):
    recipe = Recipe("blank", UNetConfig(widths=(8, 16), factor=1, embedding=8, dropout=0.3), 8, batch=4, train_count=50)
    train(recipe, tmp_path / "whole", dataset=Blank(), sample_every=0)
    interrupted(recipe, tmp_path / "cut", Blank(), at=3)
    train(recipe, tmp_path / "cut", dataset=Blank(), sample_every=0)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    plain = dataclasses.replace(recipe, net=dataclasses.replace(recipe.net, dropout=0.0))
    train(plain, tmp_path / "plain", dataset=Blank(), sample_every=0)
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "plain"))


def test_ctrl_c_finishes_the_step_and_writes_a_checkpoint(tmp_path):
    train(TINY, tmp_path / "whole", dataset=Points())
    handler = signal.getsignal(signal.SIGINT)
    interrupted(TINY, tmp_path / "cut", Points(), at=23)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "cut" / "checkpoint.safetensors").exists()
    assert len(load_file(tmp_path / "cut" / "checkpoint.safetensors")["losses"]) == 23
    train(TINY, tmp_path / "cut", dataset=Points())
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


CHILD = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("points", {here!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import dataclasses
from fanal.training import _Sitting, train
recipe = dataclasses.replace(module.TINY, iterations=400)
print("ready", flush=True)
train(recipe, Path(sys.argv[1]), dataset=module.Points(), checkpoint_every=3, validate_every=5)
"""


def _child(folder):
    code = textwrap.dedent(CHILD).format(here=points.__file__)
    child = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    child.stdout.readline()
    return child


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    recipe = dataclasses.replace(TINY, iterations=400)
    train(recipe, tmp_path / "whole", dataset=Points(), validate_every=5)
    folder, chance, kills = tmp_path / "killed", random.Random(0), []
    for _ in range(3):
        child = _child(folder)
        begin = len(_losses(folder))
        limit = time.monotonic() + 60
        while len(_losses(folder)) < begin + 3 and child.poll() is None and time.monotonic() < limit:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.15)
        child.kill()
        child.wait()
        child.stdout.close()
        kills.append(len(_losses(folder)))  # reads the checkpoint: it is whole
        if (folder / "model.json").exists():
            break
    assert len({k for k in kills if 0 < k < 400}) >= 2, kills  # else nothing was tested
    if not (folder / "model.json").exists():
        # What a kill in the middle of a write leaves behind must do no harm.
        with (folder / "log.jsonl").open("a") as file:
            file.write('{"iteration": 999, "loss": 0.1}\n{"iteration": 3, "lo')
        (folder / ".checkpoint.safetensors.part1").write_bytes(b"half")
        train(recipe, folder, dataset=Points(), validate_every=5)
    assert same(weights(tmp_path / "whole"), weights(folder))
    keys = ("iteration", "loss", "held_out")
    assert [[e[k] for k in keys] for e in log(folder)] == [[e[k] for k in keys] for e in log(tmp_path / "whole")]
    left = ["curve.png", "log.jsonl", "model.json", "model.safetensors", "samples"]
    assert sorted(p.name for p in folder.iterdir()) == left


def _losses(folder):
    path = folder / "checkpoint.safetensors"
    try:
        return load_file(path)["losses"]
    except FileNotFoundError:
        return []


def test_divergence_is_an_error_that_says_where(tmp_path):
    class Broken(Points):
        def data(self, split="train", count=None, seed=0):
            data = super().data(split, count, seed)
            return Data(data.x.index_fill(0, torch.arange(0, 200, 20), torch.inf), data.labels)

    with pytest.raises(NonFiniteError, match="iteration [0-9]+"):
        train(dataclasses.replace(TINY, sigma_data=1.0, held_out_count=0), tmp_path, dataset=Broken())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"iterations": 0}, "iterations"),
        ({"batch": 2.5}, "batch"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"label_dropout": 1.0}, "label_dropout"),
        ({"conditional": False}, "label_dropout is 0.2, but conditional is False"),
        ({"warmup": 50}, "warmup takes 50 of 60"),
        ({"objective": "ddpm"}, "unknown objective"),
        ({"weighting": "none"}, 'use objective "dae"'),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"sigma_min": 100.0}, "sigma_min"),
        ({"sigma_data": -1.0}, "sigma_data"),
        ({"train_count": 0}, "train_count"),
        ({"threads": 0}, "threads"),
    ],
)
def test_clashing_options_are_refused(changes, words):
    with pytest.raises(FanalError, match=words):
        dataclasses.replace(TINY, **changes)


def test_recipe_and_data_must_fit(tmp_path):
    class Unlabeled(Points):
        classes = ()

    with pytest.raises(FanalError, match="no classes"):
        train(TINY, tmp_path, dataset=Unlabeled())
    with pytest.raises(FanalError, match="true score"):
        train(dataclasses.replace(TINY, objective="esm"), tmp_path, dataset=Points())
    with pytest.raises(FanalError, match="checkpoint_every"):
        train(TINY, tmp_path, dataset=Points(), checkpoint_every=0)
    with pytest.raises(FanalError, match="unknown data set"):
        train(TINY, tmp_path)


def test_recipes_survive_json():
    for recipe in (TINY, dataclasses.replace(TINY, noise_levels=Middle(share=0.3)), *RECIPES.values()):
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    good = TINY.to_dict()
    for wrong in (
        {**good, "bach": 3},
        {**good, "noise_levels": {"name": "uniform"}},
        {**good, "noise_levels": {"name": "middle", "sd": 1}},
        {**good, "net": {"architecture": "mlp", "widht": 3}},
        {k: v for k, v in good.items() if k != "net"},
    ):
        with pytest.raises(FanalError):
            Recipe.from_dict(wrong)


def test_the_learning_rate_rises_stays_and_falls():
    recipe = dataclasses.replace(TINY, iterations=100, warmup=10, learning_rate=2.0)
    rates = [recipe.rate(i) for i in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert set(rates[10:61]) == {2.0}
    assert rates[80] == pytest.approx(1.0)
    assert all(a > b for a, b in zip(rates[61:], rates[62:], strict=False))
    assert recipe.rate(100) == pytest.approx(0.0)


def test_draws_are_independent_and_follow_the_recipe():
    recipe = dataclasses.replace(TINY, batch=5000, label_dropout=0.3)
    a, b = draw(recipe, 0, 10, (2,)), draw(recipe, 1, 10, (2,))
    assert not torch.equal(a.noise, b.noise)
    assert torch.equal(a.noise, draw(recipe, 0, 10, (2,)).noise)
    # 5 standard errors of 5,000 draws each.
    assert abs(float((a.noise * b.noise).mean())) < 5 / 10_000**0.5
    assert abs(float(a.drop.double().mean()) - 0.3) < 5 * (0.21 / 5000) ** 0.5
    assert abs(float(a.sigma.log().mean()) + 1.2) < 5 * 1.2 / 5000**0.5
    counts = torch.bincount(a.indices, minlength=10).double()
    assert float(((counts - 500) ** 2 / 500).sum()) < 36  # chi-squared with 9 degrees of freedom: p = 4e-5


def _error(model, exact, sigma):
    """Root mean square distance to the exact denoiser, in units of c_out."""
    generator = torch.Generator().manual_seed(5)
    clean = MEANS[torch.randint(3, (4000,), generator=generator)]
    clean = clean + 0.3 * torch.randn(4000, 2, generator=generator)
    x = clean + sigma * torch.randn(4000, 2, generator=generator)
    level = torch.tensor(sigma)
    c_out = sigma * model.sigma_data / (sigma**2 + model.sigma_data**2) ** 0.5
    return float((model(x, level) - exact(x, level)).square().mean().sqrt()) / c_out


def test_training_comes_near_the_exact_denoiser(tmp_path):
    exact = Mixture(MEANS, std=0.3)
    base = Recipe("points", MLPConfig(width=64, depth=2), 60, batch=256, learning_rate=3e-3, train_count=20_000)
    errors = {}
    for iterations in (60, 1500):
        model = train(
            dataclasses.replace(base, iterations=iterations, noise_levels=LogNormal(-0.8, 1.2)),
            tmp_path / str(iterations),
            dataset=Points(),
        )
        errors[iterations] = [_error(model, exact, sigma) for sigma in (0.1, 0.3, 1.0, 3.0)]
    # The error of a network without training, F = 0, is that of the best linear denoiser, about 0.3 to 0.7 here.
    for early, late in zip(errors[60], errors[1500], strict=True):
        assert late < 0.6 * early
    assert max(errors[1500]) < 0.12, errors


def test_pictures_are_drawn_as_it_goes(tmp_path):
    from PIL import Image

    recipe = Recipe("blank", UNetConfig(widths=(8, 16), factor=1, embedding=8), 4, batch=4, train_count=50)
    train(recipe, tmp_path, dataset=Blank(), sample_every=2)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["0000002.png", "0000004.png"]
    with Image.open(tmp_path / "samples" / "0000004.png") as picture:
        assert picture.width >= 32


@pytest.mark.slow
def test_the_digits_recipe_learns_its_classes(tmp_path):
    recipe = dataclasses.replace(RECIPES["digits8"], iterations=1500)
    model = train(recipe, tmp_path, sample_every=0)
    card = read_card(tmp_path)
    assert card["loss"]["last_200"] < 0.7 * card["loss"]["first_200"]
    # At high noise the label decides the answer: digits differ by much more than the network's error.
    x = 80.0 * torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    answers = model(x[:1].expand(10, -1, -1, -1), torch.tensor(80.0), torch.arange(10))
    assert float(torch.pdist(answers.flatten(1)).min()) > 1.0
