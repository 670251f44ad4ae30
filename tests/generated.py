"""A small run, a network, and a hand on Ctrl-C."""

from __future__ import annotations

import pytest

from fanal.generation import SampleConfig
from toys import tiny

SMALL = SampleConfig("mixture:grid2", steps=8, count=22, block=5, seed=2)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Start in an empty folder, so that the default --out cannot litter."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def the_toys_count_only_where_asked(monkeypatch):
    monkeypatch.delenv("FANAL_TEST_LOG", raising=False)
    monkeypatch.delenv("FANAL_TEST_SLEEP", raising=False)


class Stop:
    """A progress display that presses Ctrl-C after some blocks."""

    def __init__(self, after, what="sampling"):
        self.after, self.what = after, what

    def __call__(self, items, what):
        for k, item in enumerate(items):
            if what == self.what and k == self.after:
                raise KeyboardInterrupt
            yield item


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A network with three classes and no verifier."""
    path = tmp_path_factory.mktemp("net") / "model"
    tiny(path, shape=(1, 8, 8), classes=3)
    return str(path)
