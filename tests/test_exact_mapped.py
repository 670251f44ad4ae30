"""Points that stay on the disk: the same answers as in memory, from the command line too, and changes are noticed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fanal as package
from fanal.datasets import Mapped, get
from fanal.errors import FanalError
from fanal.exact import Dataset, Gaussian, Mixture
from fanal.exact.named import content
from fanal.exact.streaming import Rows
from fanal.loading import fingerprint
from toys import fanal, record, refused


def images(count=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)


@pytest.fixture
def place(tmp_path):
    np.save(tmp_path / "points.npy", images())
    return tmp_path / "points.npy"


def test_a_mapped_set_is_the_same_set(place):
    source = get(f"array:{place}")
    assert isinstance(source, Mapped)
    assert source.shape == (1, 4, 4)
    assert (source.count("train"), source.count("held out")) == (48, 12)
    kept, out = (source.levels(split).values for split in ("train", "held out"))
    every = {values.tobytes() for values in images()}
    assert {v.tobytes() for v in kept} | {v.tobytes() for v in out} == every
    assert torch.equal(source.data("train", 5).x, source.data().x[:5])
    assert torch.allclose(source.data().x, torch.from_numpy(kept / 127.5 - 1).float(), atol=1e-6)
    rows = source.rows()
    assert isinstance(rows.values, np.memmap)
    assert (np.diff(rows.index) > 0).all()
    assert sorted(v.tobytes() for v in rows[:]) == sorted(v.tobytes() for v in kept)


def test_the_denoiser_reads_from_the_file(place):
    """Block by block, it returns what it returns for the points in memory."""
    rows = Mapped.open(f"array:{place}").rows()
    mapped, memory = Dataset(rows, block=7), Dataset(torch.from_numpy(np.array(rows[:])))
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for sigma in (0.05, 0.7, 20.0):
        assert torch.allclose(mapped(x, torch.tensor(sigma)), memory(x, torch.tensor(sigma)), atol=1e-12)
        assert torch.allclose(mapped.log_density(x, sigma), memory.log_density(x, sigma))
    for a, b in zip(mapped.nearest(x, 3), memory.nearest(x, 3), strict=True):
        assert torch.allclose(a, b)
    assert torch.equal(Dataset(Rows(images(), np.arange(3))).points.rows(torch.tensor([[2, 0]]), "cpu", x.dtype)[0, 1],
                       torch.from_numpy(images()[0] / 127.5 - 1).flatten())  # fmt: skip


def test_files_from_the_command_line(place, tmp_path):
    words = ("--count", 6, "--steps", 6)
    assert fanal("sample", f"data:{place}", *words, "--out", tmp_path / "replayed").exit_code == 0
    x = load_file(tmp_path / "replayed" / "samples.safetensors")["x"]
    train = get(f"array:{place}").data().x
    assert float(torch.cdist(x.flatten(1), train.flatten(1)).amin(1).max()) < 0.01
    audit = ("audit", f"data:{place}", "--data", f"array:{place}", *words, "--traced", 3, "--level", 0.1)
    result = fanal(*audit, "--out", tmp_path / "caught")
    assert result.exit_code == 0, result.output
    found = record(tmp_path / "caught")["results"]
    assert (found["points"], found["copies"]["share"], found["copies"]["held"]) == (48, 1, 12)
    assert package.load(f"gaussian:{place},rank=3").shape == (1, 4, 4)


def test_what_is_no_array_of_samples_is_refused(tmp_path):
    for name, values in {
        "scalars": np.zeros(5),
        "none": np.zeros((0, 2)),
        "whole": np.zeros((4, 2), dtype=np.int64),
        "objects": np.array([[None, 1]], dtype=object),
    }.items():
        np.save(tmp_path / f"{name}.npy", values, allow_pickle=True)
        with pytest.raises(FanalError, match=name):
            get(f"array:{tmp_path}/{name}.npy")
    np.savez(tmp_path / "several.npy", a=np.zeros((3, 2)))
    (tmp_path / "several.npy.npz").rename(tmp_path / "several.npy")
    with pytest.raises(FanalError, match="several"):
        get(f"array:{tmp_path}/several.npy")
    (tmp_path / "text.npy").write_text("no numbers")
    with pytest.raises(FanalError, match=r"no array of numbers; .* numpy\.save"):
        get(f"array:{tmp_path}/text.npy")
    np.save(tmp_path / "hole.npy", np.full((20, 2), math.nan))
    with pytest.raises(FanalError, match="not finite"):
        get(f"array:{tmp_path}/hole.npy").data()
    assert refused(fanal("sample", f"data:{tmp_path}/absent.npy", "--out", tmp_path / "run"), "No such file", "absent")
    assert refused(
        fanal("audit", "digits8", "--data", "array:absent.npy", "--out", tmp_path / "run"), "No such file", "absent"
    )


def test_changed_bytes_change_the_fingerprint(place, tmp_path):
    """Of a mapped file and of a folder, also where names, sizes and times stay."""
    folder = tmp_path / "few"
    folder.mkdir()
    for i, pixels in enumerate(images(6)):
        Image.fromarray(pixels[0]).save(folder / f"{i}.bmp")
    before = content("data", str(folder)), content("data", str(place))
    assert before == (fingerprint(f"data:{folder}"), fingerprint(f"data:{place}"))
    assert content("gaussian", f"{folder},count=3") == before[0]
    Image.fromarray(255 - images(6)[2, 0]).save(folder / "2.bmp")
    np.save(place, images(seed=1))
    after = content("data", str(folder)), content("data", str(place))
    assert before[0] != after[0]
    assert before[1] != after[1]
    Image.fromarray(images(6)[2, 0]).save(folder / "2.bmp")
    assert content("data", str(folder)) == before[0]
    (folder / "5.bmp").rename(folder / "7.bmp")
    assert content("data", str(folder)) != before[0]
    assert content("data", "digits8") == ""


def test_noise_levels_below_zero_are_refused():
    for law in (Mixture(torch.zeros(2, 3), std=0.1), Gaussian(torch.zeros(3), 1.0), Dataset(torch.zeros(4, 3))):
        for sigma in (-1.0, math.nan):
            with pytest.raises(FanalError, match="sigma"):
                law(torch.zeros(2, 3), torch.tensor(sigma))
        with pytest.raises(FanalError, match="sigma"):
            law(torch.zeros(2, 3), torch.tensor([1.0, -0.1]))
