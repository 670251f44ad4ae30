"""What a model costs: calls are real, and a projection is calls times batches times seconds."""

from __future__ import annotations

import time

import pytest
import torch

import fanal as library
from fanal.cost import Cost, measure_cost
from fanal.errors import FanalError
from fanal.loading import load
from toys import Toy, fanal, refused


def test_the_seconds_are_those_of_a_call():
    pauses = iter([0.2, 0.02, 0.02, 0.02, 0.3])  # the first call is not timed, one outlier does not count

    def after(x, sigma, denoised):
        time.sleep(next(pauses))
        return denoised

    model = library.Counted(Toy(after))
    found = measure_cost(model, batch=7, repeats=4)
    assert (model.calls, model.evaluations) == (5, 35)
    assert 0.02 <= found.seconds < 0.1
    assert found.quartiles[1] > 0.1 > found.quartiles[0]


def test_a_run_takes_whole_batches():
    cost = Cost(batch=16, seconds=0.5, quartiles=(0.5, 0.5), memory=1, parameters=0, device="cpu")
    assert cost.projected(calls=18, count=33) == 18 * 3 * 0.5


def test_memory_holds_at_least_the_network():
    net = load("hands32")
    found = measure_cost(net, batch=2, repeats=1)
    assert found.parameters == sum(p.numel() for p in net.denoiser.parameters()) == 362_212
    filled = torch.ones(2**27)  # 512 MiB that the process did hold
    assert measure_cost(net, batch=2, repeats=1).memory >= filled.nbytes
    with pytest.raises(FanalError, match="at least 1, got 0 and 1"):
        measure_cost(net, batch=0, repeats=1)


def test_the_command_says_it():
    told = fanal("models", "cost", "hands32", "--batch", 2, "--repeats", 1, "--calls", 40, "--count", 8)
    assert told.exit_code == 0, told.output
    assert "362,212" in told.stdout
    assert "8 samples at 40 calls" in told.stdout
    assert refused(fanal("models", "cost", "handz32"), "unknown model")
