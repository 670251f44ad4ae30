"""A trajectory holds what the run did, and survives the disk bit by bit."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from fanal import files
from fanal.errors import FanalError
from fanal.sampling import trace
from fanal.schedules import polynomial
from fanal.solvers import Churn, Euler, Heun
from fanal.trajectory import Trajectory
from problems import mixture, start


def recorded(solver=None, dtype=torch.float32, meta=None):
    D = mixture()
    x = start(D, dtype=dtype)
    seeds = [5, 6, 7, 2**64 - 1]
    return Trajectory.record(trace(D, x, polynomial(6, sigma_max=10.0), solver or Heun(), seeds), meta)


def test_record_keeps_every_state():
    D = mixture()
    x = start(D)
    grid = polynomial(6, sigma_max=10.0)
    run = Trajectory.record(trace(D, x, grid, Euler()))
    assert torch.equal(run.sigmas, grid)
    assert torch.equal(run.x[0], x)
    assert run.seeds is None
    for i in range(6):
        assert torch.equal(run.denoised[i], D(run.x[i], grid[i]))
        step = run.x[i] + (grid[i + 1] - grid[i]) * (run.x[i] - run.denoised[i]) / grid[i]
        torch.testing.assert_close(run.x[i + 1], step, rtol=1e-12, atol=1e-12)


def test_record_makes_no_graph_and_restores_the_gradient_mode():
    D = mixture()
    run = Trajectory.record(trace(D, start(D).requires_grad_(), polynomial(3, sigma_max=10.0), Euler()))
    assert not run.x[-1].requires_grad
    assert torch.is_grad_enabled()


def test_info_that_some_step_lacks_is_nan_there():
    """Heun's step into 0 makes no second call; churn notes `x_hat` only where it churns."""
    second = recorded().info["denoised_next"]
    assert torch.isfinite(second[:-1]).all()
    assert torch.isnan(second[-1]).all()
    D = mixture()
    grid = polynomial(6, sigma_max=10.0, zero=False)
    assert Trajectory.record(trace(D, start(D), grid, Heun())).info["denoised_next"].shape == (6, 4, 2)
    churned = Trajectory.record(trace(D, start(D), grid, Churn(s_min=0.0), range(4)))
    assert churned.info["x_hat"].shape == (6, 4, 2)


def test_record_refuses_nothing():
    with pytest.raises(FanalError, match="empty"):
        Trajectory.record(iter(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_bit_exact(tmp_path, dtype):
    D = mixture()
    grid = polynomial(6, sigma_max=10.0, zero=False)
    run = Trajectory.record(trace(D, start(D, dtype=dtype), grid, Heun(), [5, 6, 7, 2**64 - 1]), {"model": "ü"})
    run.save(tmp_path / "new" / "run.safetensors")
    back = Trajectory.load(tmp_path / "new" / "run.safetensors")
    assert torch.equal(back.sigmas, run.sigmas)
    assert torch.equal(back.x, run.x)
    assert torch.equal(back.denoised, run.denoised)
    assert back.x.dtype == dtype
    assert back.info.keys() == run.info.keys() == {"denoised_next"}
    assert torch.equal(back.info["denoised_next"], run.info["denoised_next"])
    assert back.seeds == (5, 6, 7, 2**64 - 1)
    assert back.meta == {"model": "ü"}


def test_a_run_without_seeds_comes_back_without(tmp_path):
    D = mixture()
    Trajectory.record(trace(D, start(D), polynomial(3, sigma_max=10.0), Euler())).save(tmp_path / "a")
    assert Trajectory.load(tmp_path / "a").seeds is None


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "run.safetensors"
    recorded().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FanalError, match=r"run\.safetensors"):
        Trajectory.load(path)


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_renamed_pickle_is_refused_and_not_executed(tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes(pickle.dumps(Bomb(str(tmp_path / "boom"))))
    with pytest.raises(FanalError, match="cannot read"):
        Trajectory.load(path)
    assert os.listdir(tmp_path) == ["run.safetensors"]


GOOD = {"sigmas": torch.tensor([2.0, 1.0]).double(), "x": torch.zeros(2, 1, 3), "denoised": torch.zeros(1, 1, 3)}
HEADER = {"format": "fanal-trajectory-1"}


@pytest.mark.parametrize(
    ("tensors", "header"),
    [
        ({}, {"format": "something-else"}),
        ({}, {"format": "fanal-trajectory-1", "meta": "{"}),
        ({}, {"format": "fanal-trajectory-1", "meta": "[1]"}),
        ({}, {"format": "fanal-trajectory-1", "meta": '{"a": ' + "[" * 100_000}),
        ({}, {"format": "fanal-trajectory-1", "seeds": "5"}),
        ({}, {"format": "fanal-trajectory-1", "seeds": "{"}),
        ({"sigmas": None}, HEADER),
        ({"x": None}, HEADER),
        ({"sigmas": torch.tensor([1.0, 1.0])}, HEADER),
        ({"sigmas": torch.tensor([1.0, float("nan")])}, HEADER),
        ({"sigmas": torch.tensor(1.0)}, HEADER),
        ({"x": torch.zeros(3, 1, 3)}, HEADER),
        ({"x": torch.zeros(2, 2, 3)}, HEADER),
        ({"x": torch.tensor(1.0)}, HEADER),
        ({"denoised": torch.tensor(1.0)}, HEADER),
        ({"denoised": torch.zeros(2, 1, 3)}, HEADER),
    ],
)
def test_a_file_that_is_no_trajectory_is_refused(tmp_path, tensors, header):
    path = tmp_path / "run.safetensors"
    save_file({k: v for k, v in {**GOOD, **tensors}.items() if v is not None}, path, header)
    with pytest.raises(FanalError):
        Trajectory.load(path)


def test_the_refused_files_differ_from_a_good_one_by_what_was_changed(tmp_path):
    save_file(GOOD, tmp_path / "good", {**HEADER, "seeds": json.dumps([3])})
    assert Trajectory.load(tmp_path / "good").seeds == (3,)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FanalError, match="cannot read"):
            Trajectory.load(path)


def test_a_failed_save_keeps_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    recorded().save(path)
    old = path.read_bytes()

    def fails(tensors, part, header):
        with open(part, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", fails)
    with pytest.raises(FanalError, match="No space left"):
        recorded(Euler()).save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["run.safetensors"]
