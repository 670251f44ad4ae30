"""`load`: every kind of spec, bound conditions, and the models that come with the package."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import fanal
from fanal import datasets
from fanal.datasets import DATASETS
from fanal.denoiser import Counted, Model
from fanal.errors import FanalError
from fanal.exact.named import GAUSSIANS, MIXTURES
from fanal.loading import card, fingerprint
from fanal.seeding import noise
from toys import tiny

SIGMA = torch.tensor(1.5, dtype=torch.float64)


def inside(model):
    while not isinstance(model, Counted):
        model = model.denoiser
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    tiny(path, classes=4, card={"data": "nothing"})
    return path


CLOSED = [
    *(f"mixture:{m}" for m in MIXTURES),
    *(f"gaussian:{g}" for g in GAUSSIANS),
    *("gaussian:digits8", "gaussian:digits8,rank=20", "mixture:digits8", "data:digits8", "data:grid2,count=200"),
]


@pytest.mark.parametrize("spec", CLOSED)
def test_closed_forms_load_and_denoise(spec):
    model = fanal.load(spec)
    assert isinstance(model, Model)
    x = noise(model.shape, range(3), 1.5, dtype=torch.float64)
    truth = model.denoiser
    assert torch.equal(model(x, SIGMA), truth(x, SIGMA))
    # Tweedie: the prediction is x + sigma²·∇log p, here by differences of the log density.
    step = 1e-4 * noise(model.shape, range(7, 10), 1.0, dtype=torch.float64)
    rise = (truth.log_density(x + step, SIGMA) - truth.log_density(x - step, SIGMA)) / 2
    along = ((model(x, SIGMA) - x) / SIGMA**2 * step).flatten(1).sum(1)
    assert torch.allclose(rise, along, rtol=1e-5, atol=1e-12)


def test_the_grid_is_the_data_sets_grid():
    truth = fanal.load("mixture:grid2").denoiser
    real = DATASETS["grid2"].data("held out", 4000).x
    assert (DATASETS["grid2"].verify(truth.draw(2000).float()) != 0).sum() <= 1
    assert (truth.nearest(real)[0] < 0.5).all()
    assert card("mixture:grid2")["data"] == "grid2"
    assert card("mixture:ring8") == card("gaussian:tilted2") == {}


def test_the_gaussian_of_the_digits_has_their_moments():
    truth, x = fanal.load("gaussian:digits8").denoiser, DATASETS["digits8"].data().x.double()
    # At a large sigma D is close to the mean, and the next order of D − mean is Σ(x − mean)/sigma².
    mean, sigma = x.mean(0), torch.tensor(1e4, dtype=torch.float64)
    assert torch.allclose(truth(mean[None], sigma)[0], mean, atol=1e-9)
    probe = noise((1, 8, 8), [0], 1.0, dtype=torch.float64)
    wanted = ((x - mean).flatten(1).T @ ((x - mean).flatten(1) @ probe.flatten())) / len(x)
    got = ((truth(mean + probe, sigma) - mean) * sigma**2).flatten()
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_folder_loads_as_the_network_that_was_saved(folder, tmp_path):
    saved = tiny(tmp_path / "again", classes=4)
    model, x = fanal.load(str(folder)), noise((1, 8, 8), range(3), 1.5)
    assert torch.equal(model(x, SIGMA), saved(x, SIGMA))
    assert (model.shape, model.sigma_min, model.sigma_max) == ((1, 8, 8), 0.002, 80.0)
    assert card(str(folder))["data"] == "nothing"


def test_a_function_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_own_model.py").write_text(
        "class D:\n"
        "    shape, sigma_min, sigma_max = (3,), 0.01, 10.0\n"
        "    def __call__(self, x, sigma):\n"
        "        return x / (1 + sigma**2)\n"
        "def make():\n    return D()\n"
        "class Inner:\n    class Deep:\n        pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = fanal.load("python:my_own_model:make")
    assert (model.shape, model.sigma_min, model.sigma_max) == ((3,), 0.01, 10.0)
    x = torch.ones(2, 3, dtype=torch.float64)
    assert torch.equal(model(x, SIGMA), x / (1 + SIGMA**2))
    assert (model.calls, model.evaluations) == (1, 2)
    assert card("python:my_own_model:make") == {}
    sys.modules.pop("my_own_model")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("hand32", "unknown model 'hand32'"),
        ("mixture:grid3", "unknown mixture 'grid3': did you mean 'grid2'"),
        ("gaussian:tilted", "unknown gaussian 'tilted': did you mean 'tilted2'"),
        ("python:toys", "expected python:MODULE:FUNC, got python:toys"),
        ("python:no_such_module:f", "cannot import no_such_module.*PYTHONPATH"),
        ("python:toys:no_such_function", "unknown function of toys"),
        ("python:toys:NUMBER", "is no function that makes a denoiser: got int"),
        ("python:toys:bare", "with the attributes shape, sigma_min and sigma_max, got function"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_to_try(spec, words):
    with pytest.raises(FanalError, match=words):
        fanal.load(spec)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(FanalError, match="it has no model.json; fanal train writes one when it ends"):
        fanal.load(str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "changed", "nan", "json", "gone", "other", "huge"])
def test_a_damaged_model_folder_is_refused(tmp_path, damage):
    path = tmp_path / "model"
    tiny(path)
    weights, about = path / "model.safetensors", path / "model.json"
    raw, content = weights.read_bytes(), json.loads(about.read_text())
    if damage == "cut":
        weights.write_bytes(raw[: len(raw) // 2])
    elif damage == "changed":
        weights.write_bytes(raw[:-3] + bytes(255 - byte for byte in raw[-3:]))
    elif damage == "nan":
        tensors = load_file(weights)
        next(iter(tensors.values())).fill_(float("nan"))
        save_file(tensors, weights)
    elif damage == "json":
        about.write_text(about.read_text()[:-20])
    elif damage == "gone":
        weights.unlink()
    elif damage == "other":
        about.write_text(json.dumps({**content, "classes": 3}))
    elif damage == "huge":
        about.write_text(json.dumps({**content, "shape": [1, 10**6, 10**6]}))
    with pytest.raises(FanalError):
        fanal.load(str(path))


def test_a_label_is_bound_for_all_or_for_each(folder):
    bare, x = fanal.load(str(folder)), noise((1, 8, 8), range(3), 1.5)
    each = bare(x, SIGMA, torch.tensor([0, 3, 1]))
    assert torch.equal(fanal.load(str(folder), labels=[0, 3, 1])(x, SIGMA), each)
    assert torch.equal(fanal.load(str(folder), labels=torch.tensor([0, 3, 1]))(x, SIGMA), each)
    assert torch.equal(fanal.load(str(folder), labels=3)(x, SIGMA), bare(x, SIGMA, torch.tensor([3, 3, 3])))
    assert not torch.equal(each[1:2], bare(x[1:2], SIGMA))
    with pytest.raises(FanalError, match="3 labels are bound, for a batch of 2"):
        fanal.load(str(folder), labels=[0, 3, 1])(x[:2], SIGMA)


@pytest.mark.parametrize("labels", [4, -1, 1.5, [0, 4], [[0, 1]], True and 7])
def test_a_label_that_is_none_is_refused(folder, labels):
    with pytest.raises(FanalError, match=r"whole numbers in \[0, 3\]"):
        fanal.load(str(folder), labels=labels)


def test_conditions_that_do_not_fit_the_model_are_refused(folder, tmp_path):
    tiny(tmp_path / "plain")
    for spec in ("mixture:grid2", str(tmp_path / "plain"), "python:toys:logged"):
        with pytest.raises(FanalError, match="takes no class labels"):
            fanal.load(spec, labels=0)
    with pytest.raises(FanalError, match="guidance needs labels"):
        fanal.load(str(folder), guidance=2.0)


@pytest.mark.parametrize("device", ["warp", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(FanalError, match="is not to be had here"):
        fanal.load("mixture:grid2", device=device)


def test_every_call_is_counted_where_the_network_is(folder):
    model = fanal.load(str(folder), labels=1, guidance=3.0)
    model(noise((1, 8, 8), range(5), 1.5), SIGMA)
    assert (inside(model).calls, inside(model).evaluations) == (1, 10)


def module(folder, monkeypatch, name, body):
    (folder / f"{name}.py").write_text(
        "import torch\n"
        "class D:\n"
        "    shape, sigma_min, sigma_max = (2,), 0.002, 80.0\n"
        f"    def __call__(self, x, sigma):\n        {body}\n"
        "def make():\n    return D()\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    return fanal.load(f"python:{name}:make")


def test_a_denoiser_that_fails_is_told_in_one_line_with_a_hint(tmp_path, monkeypatch):
    D = module(tmp_path, monkeypatch, "mixes", "return torch.nn.Linear(1, 2)(sigma.reshape(1, 1))")
    with pytest.raises(FanalError, match=r"mixes:make failed at sigma 2: RuntimeError: .*sigma\.to\(x\)"):
        D(torch.ones(1, 2), torch.tensor(2.0, dtype=torch.float64))
    D = module(tmp_path, monkeypatch, "divides", "return x / (1 // 0)")
    with pytest.raises(FanalError, match=r"divides:make failed at sigma 2: ZeroDivisionError"):
        D(torch.ones(1, 2), torch.tensor(2.0))


def test_a_misspelt_function_gets_the_nearest_name(tmp_path, monkeypatch):
    module(tmp_path, monkeypatch, "named", "return x")
    with pytest.raises(FanalError, match="did you mean 'make'"):
        fanal.load("python:named:mak")


def test_a_missing_folder_is_called_one():
    with pytest.raises(FanalError, match=r"no folder \./nowhere"):
        fanal.load("./nowhere")


def test_a_loaded_model_takes_a_plain_number_as_sigma():
    D = fanal.load("mixture:grid2")
    x = torch.ones(3, 2)
    assert torch.equal(D(x, 2.0), D(x, torch.tensor(2.0)))


def test_data_is_the_set_itself():
    digits = DATASETS["digits8"]
    model = fanal.load("data:digits8")
    assert card("data:digits8") == {"data": "digits8"}
    assert card("data:grid2,count=50")["repair"] == card("mixture:grid2")["repair"]
    assert card("gaussian:digits8") == card("mixture:digits8") == {}  # their samples are no digits
    held = digits.data("held out", 5).x
    assert float(inside(fanal.load("data:digits8,split=held_out")).denoiser.nearest(held)[0].max()) == 0
    assert len(inside(fanal.load("data:digits8,count=70")).denoiser) == 70
    three = fanal.load("data:digits8", labels=3)
    x = fanal.sample(three, noise(model.shape, range(4), 80.0), fanal.schedules.polynomial(20), fanal.solvers.Euler())
    distance, index = inside(model).denoiser.nearest(x)
    assert float(distance.max()) < 1e-3
    assert set(digits.data().labels[index[:, 0]].tolist()) == {3}


def test_data_of_a_folder_stays_bytes(tmp_path):
    from PIL import Image

    for i in range(10):
        Image.new("L", (6, 6), 25 * i).save(tmp_path / f"{i}.png")
    model = inside(fanal.load(f"data:{tmp_path},size=4,count=5")).denoiser
    assert model.shape == (1, 4, 4)
    assert len(model) == 5
    assert model.points.bytes
    real = datasets.get(f"folder:{tmp_path},size=4").data("train", 5).x
    assert float(model.nearest(real)[0].max()) < 1e-6
    assert card(f"data:{tmp_path},size=4,count=5")["data"] == f"folder:{tmp_path},size=4"
    first = fingerprint(f"data:{tmp_path}")
    (tmp_path / "0.png").rename(tmp_path / "zero.png")
    assert fingerprint(f"data:{tmp_path}") != first


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("data:digits9", "digits8"),
        ("data:digits8,cuont=4", "count"),
        ("data:digits8,count=0", "whole number"),
        ("data:digits8,count=4,count=5", "twice"),
        ("data:digits8,split=test", "held_out"),
        ("mixture:hands32", "no classes"),
        ("gaussian:digits8,rank=99", "rank"),
        ("gaussian:nothing", "tilted2"),
    ],
)
def test_closed_forms_of_nothing_are_refused(spec, said):
    with pytest.raises(FanalError, match=said):
        fanal.load(spec)


def test_what_exists_is_suggested_once(tmp_path):
    with pytest.raises(FanalError) as told:  # nothing is known twice, though grid2 is a mixture and a data set
        fanal.load("mixture:grid")
    assert str(told.value).split("known: ")[1].split(", ").count("grid2") == 1
    with pytest.raises(FanalError, match=f"did you mean 'folder:{tmp_path}'"):
        datasets.get(str(tmp_path))
