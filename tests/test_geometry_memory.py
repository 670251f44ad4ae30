"""More trajectories need no more memory: nothing of a trajectory is kept once its block is merged."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from fanal.geometry.blocks import Gathering, measured_block
from fanal.geometry.command import GeometryConfig
from fanal.geometry.command import geometry as measure
from fanal.preparation import prepare
from toys import environment


def kept(found):
    """Bytes that are held, whole storages behind views among them."""
    return len(pickle.dumps(found))


def test_what_is_kept_of_blocks_does_not_grow():
    setup, _ = prepare(GeometryConfig("mixture:grid2", steps=10, count=32, drawn=4).sampling())
    found, sizes = Gathering(), []
    blocks = [measured_block(setup, None, range(a, a + 8), drawn=4) for a in range(0, 32, 8)]
    for i in range(200):
        found.add(blocks[min(i, 1 + i % 3)])  # the first one alone has drawn trajectories
        sizes += [kept(found)] if i in (10, 100, 199) else []
    assert found.bands["distance"].count == found.numbers["length / chord"].count == found.spent["count"] == 1600
    assert max(sizes) - min(sizes) < 500  # longer whole numbers; one number of each trajectory would be 12,000
    later = blocks[1][0]
    assert {value.ndim for value in later.values()} == {1}  # a mean over trajectories, or a number of each


def test_files_do_not_grow(tmp_path):
    sizes = []
    for count in (6, 60):
        config = GeometryConfig("mixture:grid2", steps=10, count=count, drawn=5, block=6)
        out = measure(config, tmp_path / str(count))
        sizes.append((out / "geometry.safetensors").stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_the_command_needs_no_more_memory_for_more_trajectories(tmp_path):
    """8,000 trajectories of 12 steps would be 1.7 MB, but one number each in a tensor of its own about 8 MB."""
    script, out = Path(__file__).parents[1] / "benchmarks" / "geometry_memory.py", tmp_path / "found.json"
    words = [sys.executable, str(script), "--out", str(out), "--counts", "500", "8000"]
    subprocess.run(words, check=True, capture_output=True, env=environment())
    few, many = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert many["evaluations"] > 15 * few["evaluations"]
    assert many["largest block file"] == few["largest block file"]
    assert many["peak MiB"] - few["peak MiB"] < 6
    assert many["bytes"]["geometry.safetensors"] == few["bytes"]["geometry.safetensors"]
