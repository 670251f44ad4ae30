"""Small models and helpers that the tests of runs, repairs and the command line share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from typer.testing import CliRunner

import fanal as package
from fanal.cli import app
from fanal.exact import Mixture
from fanal.files import read_tensors
from fanal.nets import MLPConfig, Preconditioned, UNetConfig, save_model

HERE = Path(__file__).parent


class Toy:
    """A closed form with something added: `python:toys:…` names the makers below."""

    shape, sigma_min, sigma_max = (2,), 0.002, 80.0

    def __init__(self, after=lambda x, sigma, denoised: denoised):
        self.truth, self.after = mixture(), after

    def __call__(self, x, sigma):
        return self.after(x, sigma, self.truth(x, sigma))


def mixture(std=0.1):
    """The grid2 data, or a smoothed stand-in for a network that blurs the modes."""
    axis = 2.0 * (torch.arange(5, dtype=torch.float64) - 2)
    return Mixture(torch.cartesian_prod(axis, axis), std=std)


class Blurred:
    """An over-smoothed network: the truth for wide modes above sigma = 0.05, for the real ones below it."""

    shape, sigma_min, sigma_max = (2,), 0.002, 80.0

    def __init__(self):
        self.wide, self.truth = mixture(0.4), mixture()

    def __call__(self, x, sigma):
        return (self.wide if float(sigma) > 0.05 else self.truth)(x, sigma)


def blurred():
    return Blurred()


def logged():
    """Counts every evaluation into the file FANAL_TEST_LOG, and takes FANAL_TEST_SLEEP seconds for each call."""
    path, pause = os.environ.get("FANAL_TEST_LOG"), float(os.environ.get("FANAL_TEST_SLEEP", "0"))

    def after(x, sigma, denoised):
        time.sleep(pause)
        if path:
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{len(x)}\n")
        return denoised

    return Toy(after)


def nan():
    """NaN for the second sample of every batch once sigma is below 1."""

    def after(x, sigma, denoised):
        if float(sigma) < 1:
            denoised[1] = float("nan")
        return denoised

    return Toy(after)


class Decoding(Toy):
    """Points whose pictures are 4×4 squares, gray by the first coordinate."""

    def decode(self, x):
        return (x[:, 0] / 5).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def decoding():
    return Decoding()


def flat():
    return Toy(lambda x, sigma, denoised: denoised[:, :1])


def listed():
    return Toy(lambda x, sigma, denoised: denoised.tolist())


def bare():
    return lambda x, sigma: x


NUMBER = 3


def read_log(path):
    """Calls and evaluations that `logged` wrote."""
    sizes = [int(line) for line in Path(path).read_text(encoding="utf-8").split()]
    return {"calls": len(sizes), "evaluations": sum(sizes)}


def tiny(folder, shape=(1, 8, 8), classes=0, card=None, seed=0):
    """Save a small network with random weights as a model folder, and return it."""
    image = len(shape) == 3
    config = UNetConfig(widths=(8, 8), factor=1) if image else MLPConfig(width=16, depth=2, embedding=8)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Preconditioned(config, shape, classes=classes)
        for weight in model.parameters():
            weight.data.normal_(0, 0.2)
    save_model(folder, model, {"recipe": {}, **(card or {})})
    return model.eval().requires_grad_(False)


def samples(folder):
    """All tensors of a run folder."""
    return read_tensors(Path(folder) / "samples.safetensors")[0]


def record(folder):
    return json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))


def part_of(out):
    """The hidden folder in which a run is made."""
    return out.with_name(f".{out.name}.part")


def same(a, b):
    """Whether two dicts of tensors agree bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fanal(*words):
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(result, *parts):
    """Whether a command ended with status 2 and one line on stderr that holds all parts."""
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2, result.output
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert str(part) in lines[0], f"{part!r} is not in {lines[0]!r}"
    return True


def script():
    """How to start the installed command."""
    beside = Path(sys.executable).with_name("fanal")
    found = str(beside) if beside.exists() else shutil.which("fanal")
    return [found] if found else [sys.executable, "-c", "from fanal.cli import main; main()"]


def environment(**more):
    """The environment of a subprocess: one thread, this very package, and `python:toys:…` can be imported."""
    path = os.pathsep.join([str(HERE), str(Path(package.__file__).parents[1])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def process(*words, **options):
    """Start the command line in its own process."""
    return subprocess.Popen(
        [*script(), *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
