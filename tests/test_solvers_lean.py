"""Between two calls of the network a step is a few fused operations on tensors of the size of x."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fanal.sampling import Span, trace
from fanal.schedules import polynomial
from fanal.solvers import DDPM, DEIS, IPNDM, LMS, RES, RK4, SOLVERS, SPNDM, DPMpp, DPMpp2S, Euler, Heun, UniPC

LARGE = (2, 3, 16, 16)
NO_ARITHMETIC = ("aten.view", "aten._unsafe_view", "aten.detach", "aten.alias", "aten._to_copy")


class Operations(TorchDispatchMode):
    """Counts operations whose result has the size of x."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape == LARGE and not str(func).startswith(NO_ARITHMETIC):
            self.names.append(str(func))
        return out


MOST = {
    "euler": (Euler(), 1),
    "heun": (Heun(), 3),
    "2S": (DPMpp2S(), 2),
    "2M": (DPMpp(2), 2),
    "3M": (DPMpp(3), 4),
    "res 3": (RES(3), 4),
    "unipc 2": (UniPC(2), 5),
    "unipc 3": (UniPC(3), 8),
    "spndm": (SPNDM(), 4),
    "ipndm 4": (IPNDM(4), 6),
    "lms 4": (LMS(4), 6),
    "deis 3": (DEIS(3), 5),
    "rk4": (RK4(), 15),
}


@pytest.mark.parametrize("name", MOST)
def test_operations_per_step(name):
    """In the middle of a run, where the history is full, and without those of the network."""
    solver, most = MOST[name]
    answer, sigmas = torch.randn(LARGE), polynomial(9, 0.1, 10.0, zero=False)
    run = list(trace(lambda x, sigma: answer, torch.randn(LARGE), sigmas, solver))
    with torch.no_grad(), Operations() as seen:
        solver.step(lambda x, sigma: answer, run[5].x, run[5].span, run[4].step.memory)
    assert len(seen.names) <= most, seen.names


@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_mixes_no_devices_and_reads_no_value_of_x(name):
    """On the device that has shapes only: reading a value, as waiting for an accelerator does, would fail there."""
    grid = polynomial(6, 0.1, 10.0)
    x, memory = torch.empty(4, 3, device="meta"), ()
    for i in range(6):
        span = Span(i, 6, grid[i], grid[i + 1], (0, 1, 2, 3))
        step = SOLVERS[name]().step(lambda x, sigma: x / (1 + sigma**2), x, span, memory)
        assert step.x_next.device == x.device
        assert {kept.device.type for kept in step.memory} <= {"meta", "cpu"}
        x, memory = step.x_next, step.memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", MOST)
def test_a_step_keeps_the_dtype_of_x(name, dtype):
    x, sigmas = torch.randn(3, 4).to(dtype), polynomial(5, 0.1, 10.0)
    for t in trace(lambda x, sigma: x / (1 + float(sigma) ** 2), x, sigmas, MOST[name][0]):
        assert t.step.x_next.dtype == dtype
        for kept in t.step.memory:
            assert kept.dtype in (dtype, torch.float64)


def test_noise_levels_in_memory_take_no_room():
    """One number, whatever the batch: it is spread over the batch without a copy."""
    span = Span(0, 9, torch.tensor(3.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64))
    step = LMS(2).step(lambda x, sigma: x / 2, torch.randn(1000, 2), span)
    assert step.memory[1].shape == (1000,)
    assert step.memory[1].stride() == (0,)


def test_ancestral_noise_adds_little():
    """Euler's step, the noise times its size, and the sum."""
    x, answer = torch.randn(LARGE), torch.randn(LARGE)
    span = Span(0, 9, torch.tensor(3.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64), (0, 1))
    with torch.no_grad(), Operations() as seen:
        DDPM().step(lambda x, sigma: answer, x, span)
    arithmetic = [name for name in seen.names if "copy" not in name and "mul.Tensor" not in name]
    assert len(arithmetic) <= 3, seen.names
