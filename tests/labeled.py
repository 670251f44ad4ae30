"""A judged run to be labeled, and the labels in its file."""

from __future__ import annotations

import shutil

import pytest

from fanal.files import read_json
from fanal.generation import SampleConfig, generate
from toys import samples

COUNT = 16


def read_labels(path):
    """Labels in a file, without those that are unsure."""
    return {int(sample): code for sample, code in read_json(path)["labels"].items() if code is not None}


@pytest.fixture(scope="module")
def hands(tmp_path_factory):
    """A small judged run with a repair, made of few steps so that samples of both kinds are there."""
    config = SampleConfig("hands32", steps=10, count=COUNT, block=COUNT, guard=("redo",), calibrate=16)
    folder = generate(config, tmp_path_factory.mktemp("labeling") / "hands")
    assert 0 < int((samples(folder)["verdict"] != 0).sum()) < COUNT
    return folder


@pytest.fixture
def run(hands, tmp_path):
    """A copy of the run, so that every test begins without labels."""
    return shutil.copytree(hands, tmp_path / "run")


def samples_verdicts(run):
    return tuple(read_json(run / "run.json")["results"]["verdicts"])
