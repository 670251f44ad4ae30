"""Statistics of features and their files: what is written is read, and what lies is refused."""

from __future__ import annotations

import io
import json
import struct
import zipfile

import numpy as np
import pytest
import torch

from fanal.errors import FanalError
from fanal.files import write_tensors
from fanal.metrics import Statistics, fid, read_statistics, write_statistics

# Statistics and their files


def test_statistics_are_numpys_and_survive_the_disk(tmp_path):
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    made = Statistics.of(x, "pixels", "")
    np.testing.assert_allclose(made.cov, np.cov(x.double().numpy().T), rtol=1e-12)
    np.testing.assert_allclose(made.mean, x.double().numpy().mean(0), rtol=1e-12)
    write_statistics(tmp_path / "s.safetensors", made)
    read = read_statistics(tmp_path / "s.safetensors")
    assert torch.equal(read.cov, made.cov)
    assert torch.equal(read.mean, made.mean)
    assert read.features is not None
    assert torch.equal(read.features, x)
    assert (read.n, read.extractor, read.sha256) == (30, "pixels", "")
    write_statistics(tmp_path / "m.safetensors", Statistics.of(x, "pixels", keep=False))
    assert read_statistics(tmp_path / "m.safetensors").features is None


def test_published_statistics_are_read(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 6))
    np.savez(tmp_path / "a.npz", mu=x.mean(0), sigma=np.cov(x.T))
    np.savez_compressed(tmp_path / "b.npz", mu=x.mean(0), sigma=np.asfortranarray(np.cov(x.T)))
    np.savez(tmp_path / "c.npz", mu=x.mean(0).astype(np.float32), sigma=np.cov(x.T).astype(np.float32), extra=x)
    for name in "abc":
        found = read_statistics(tmp_path / f"{name}.npz")
        np.testing.assert_allclose(found.cov, np.cov(x.T), rtol=1e-5, atol=1e-7)
        assert (found.n, found.extractor, found.features) == (None, "", None)
    assert fid(Statistics.of(torch.from_numpy(x), "inception"), read_statistics(tmp_path / "a.npz")).value < 1e-10


def test_statistics_of_different_extractors_are_never_compared():
    x = torch.randn(30, 5)
    own, other = Statistics.of(x, "fanal-features32", "a" * 64), Statistics.of(x, "inception", "b" * 64)
    newer = Statistics.of(x, "fanal-features32", "c" * 64)
    for stranger in (other, newer):
        with pytest.raises(FanalError, match="different extractors"):
            fid(own, stranger)
    assert "sha256 aaaaaaaaaaaa)" in own.label()


class Trap:
    def __reduce__(self):
        return (open, ("executed", "w"))


def hostile(path, case):
    mu, sigma = np.zeros(4), np.eye(4)
    if case == "pickle":
        np.savez(path, mu=mu, sigma=np.array([Trap()], dtype=object))
    elif case == "no sigma":
        np.savez(path, mu=mu)
    elif case == "not finite":
        np.savez(path, mu=mu, sigma=np.full((4, 4), np.nan))
    elif case == "not square":
        np.savez(path, mu=mu, sigma=np.zeros((4, 3)))
    elif case == "not symmetric":
        np.savez(path, mu=mu, sigma=np.triu(np.ones((4, 4))))
    elif case == "whole numbers":
        np.savez(path, mu=mu.astype(int), sigma=sigma)
    elif case == "huge claim":
        head = "{'descr': '<f8', 'fortran_order': False, 'shape': (8000, 8000), }".ljust(118) + "\n"
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + b"\0" * 64
        plain = io.BytesIO()
        np.save(plain, mu)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mu.npy", plain.getvalue())
            archive.writestr("sigma.npy", content)
    elif case == "wide":
        head = "{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999,), }".ljust(118) + "\n"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mu.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode())
    elif case == "cut off":
        np.savez(path, mu=mu, sigma=sigma)
        path.write_bytes(path.read_bytes()[:-60])
    else:
        path.write_bytes(b"PK nonsense")


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("pickle", "must hold at most"),
        ("no sigma", "sigma"),
        ("not finite", "NaN"),
        ("not square", "no mean and covariance"),
        ("not symmetric", "not symmetric"),
        ("whole numbers", "int64"),
        ("huge claim", "another length"),
        ("wide", "must hold at most"),
        ("cut off", "cannot read"),
        ("junk", "cannot read"),
    ],
)
def test_a_hostile_npz_is_refused_and_nothing_is_run(tmp_path, monkeypatch, case, part):
    monkeypatch.chdir(tmp_path)
    hostile(tmp_path / "bad.npz", case)
    with pytest.raises(FanalError, match=part):
        read_statistics(tmp_path / "bad.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


def test_random_damage_never_gets_through(tmp_path):
    """Each damaged file is read as statistics or refused with a FanalError; nothing else ever comes out."""
    x = np.random.default_rng(0).normal(size=(20, 3))
    np.savez_compressed(tmp_path / "good.npz", mu=x.mean(0), sigma=np.cov(x.T))
    write_statistics(tmp_path / "good.safetensors", Statistics.of(torch.from_numpy(x), "pixels"))
    random, refused = np.random.default_rng(1), 0
    for suffix in (".npz", ".safetensors"):
        whole = (tmp_path / f"good{suffix}").read_bytes()
        for _ in range(150):
            damaged = bytearray(whole)
            for place in random.integers(0, len(whole), 3):
                damaged[place] = random.integers(256)
            (tmp_path / f"bad{suffix}").write_bytes(damaged)
            try:
                found = read_statistics(tmp_path / f"bad{suffix}")
                assert bool(torch.isfinite(found.cov).all())
            except FanalError:
                refused += 1
    assert 100 < refused < 300


@pytest.mark.parametrize(
    "change",
    [
        {"n": 7},
        {"n": "many"},
        {"n": True},
        {"extractor": 3},
        {"sha256": None},
        {"extractor": "x" * 1000},
    ],
)
def test_a_statistics_file_that_lies_is_refused(tmp_path, change):
    x = torch.randn(20, 3, dtype=torch.float64)
    about = {"n": 20, "extractor": "pixels", "sha256": ""} | change
    tensors = {"mean": x.mean(0), "cov": torch.cov(x.T), "features": x.float()}
    header = {"format": "fanal-statistics-1", "statistics": json.dumps(about)}
    write_tensors(tmp_path / "s.safetensors", tensors, header)
    with pytest.raises(FanalError, match=r"s\.safetensors"):
        read_statistics(tmp_path / "s.safetensors")


def test_other_files_are_no_statistics(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(3, 2)})
    with pytest.raises(FanalError, match="--write-stats FILE writes one"):
        read_statistics(tmp_path / "x.safetensors")
    with pytest.raises(FanalError, match="No such file"):
        read_statistics(tmp_path / "y.safetensors")
