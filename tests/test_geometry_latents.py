"""Models whose samples are no pictures until they are decoded: `fanal geometry` and `fanal audit` decode them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fanal as package
from fanal import pictures
from fanal.denoiser import network_of
from fanal.geometry.command import GeometryConfig
from fanal.geometry.command import geometry as measure
from fanal.memorization.command import AuditConfig, audit
from fanal.report.geometry import geometry_page
from fanal.sampling import sample
from fanal.solvers import Euler
from toys import record, samples

DECODING = "python:toys:decoding"


def test_geometry_shows_decoded_pictures(tmp_path):
    """Of points in the plane that stand for gray squares, beside the plane's own data."""
    folder = measure(
        GeometryConfig(DECODING, steps=8, count=5, drawn=3, block=2, data="grid2", points=60), tmp_path / "run"
    )
    kept = load_file(folder / "geometry.safetensors")
    for name in ("strip", "strip_x", "strip_exact x", "strip_D*(exact x)", "strip_forward", "strip_1-D"):
        assert kept[name].shape == (3, 8, 4, 4, 1), name
    assert "neighbors" not in kept  # the data are points, which nobody decodes
    assert "rebuilt" not in kept  # drawn as pictures
    model = package.load(DECODING)
    x = package.noise((2,), range(3), model.sigma_max)
    end = sample(model, x, package.schedules.polynomial(8, model.sigma_min, model.sigma_max), Euler())
    shown = pictures.to_bytes(network_of(model).decode(end))[:, 0]
    assert int((kept["strip"][:, -1, :, :, 0].int() - shown.int()).abs().max()) <= 1
    names = {figure.name for figure in geometry_page(folder, record(folder)).figures}
    assert {"strips", "diagnosis", "rebuilt", "score", "entropy"} <= names
    assert "frechet" not in record(folder)["results"]  # features are of pictures


def test_an_audit_shows_decoded_pairs(tmp_path):
    """Each of the closest samples above its nearest training point, both decoded."""
    config = AuditConfig(DECODING, "grid2", steps=6, count=12, points=40, held=30, level=0.1, traced=3, block=8)
    folder = audit(config, tmp_path / "run")
    kept, decode = samples(folder), network_of(package.load(DECODING)).decode
    with Image.open(folder / "pairs.png") as image:
        pixels = np.asarray(image)
    points = package.datasets.get("grid2").data("train", 40).x
    order = kept["ratio"].argsort()[:10]  # in rows of ten
    pair = [pictures.grid(decode(x.float())) for x in (kept["x"][order], points[kept["index"][order]])]
    assert np.array_equal(pixels, np.asarray(pictures.beside(pair)))
    assert len(np.unique(pixels)) > 3  # squares of several grays
    assert record(folder)["results"]["closest"]


def test_geometry_of_a_pipeline(tmp_path):
    """Stable Diffusion's latents, with a prompt and guidance: pictures are its own decoder's."""
    pytest.importorskip("diffusers")
    import pipelines

    pipelines.make_sd(scheduler="DDIMScheduler").save_pretrained(tmp_path / "sd")
    spec = f"diffusers:{tmp_path / 'sd'}"
    shared = {"steps": 6, "count": 3, "drawn": 2, "block": 2, "window": 2, "prompt": "a red dog", "guidance": 3.0}
    folder = measure(GeometryConfig(spec, **shared), tmp_path / "run")
    kept, told = load_file(folder / "geometry.safetensors"), record(folder)
    model = package.load(spec, prompt="a red dog", guidance=3.0)
    grid = network_of(model).grid(6)
    assert told["results"]["sigmas"] == pytest.approx(grid.tolist())
    end = sample(model, package.noise(model.shape, range(2), float(grid[0])), grid, Euler())
    shown = pictures.to_bytes(network_of(model).decode(end)).movedim(1, -1)
    assert kept["strip"].shape == (2, 6, *shown.shape[1:])
    assert int((kept["strip"][:, -1].int() - shown.int()).abs().max()) <= 2
    assert told["results"]["d"] == torch.Size(model.shape).numel()
