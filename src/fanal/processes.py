"""Training in several processes, as `torchrun` or `accelerate launch` start them."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fanal.errors import FanalError

__all__ = ["Processes", "check_device", "join", "launched"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Processes:
    """This process and those beside it.

    Attributes:
        device: where this process trains.
        rank: number of this process.
        count: how many there are.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def add(self, tensors: Sequence[Tensor], *numbers: float) -> list[float]:
        """Replace tensors by their sums over all processes, and return the sums of numbers.

        Every process gets the same bits. With one process nothing happens.
        """
        if self.count == 1:
            return list(numbers)
        from accelerate.utils import reduce

        own = torch.tensor(numbers, dtype=torch.float32, device=self.device)
        whole = cast(Tensor, reduce(torch.cat([*(t.reshape(-1).float() for t in tensors), own]), "sum"))
        start = 0
        for tensor in tensors:
            tensor.copy_(whole[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()
        return whole[start:].tolist()

    def agree(self, make: Callable[[], _T]) -> _T:
        """Call a function in the main process, and return its result in all of them.

        Raises:
            FanalError: it raised one; then every process does.
        """
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        told: list[Any] = [None, None]
        if self.main:
            try:
                told[0] = make()
            except FanalError as error:
                told[1] = str(error)
        broadcast_object_list(told)
        if told[1] is not None:
            raise FanalError(told[1])
        return told[0]


def launched() -> int:
    """Return the rank of this process if it is one of several, as the launcher's variables say; else 0."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def check_device(device: str | torch.device) -> torch.device:
    """Return a device that works here.

    Raises:
        FanalError: there is no such device.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise FanalError(f"device {str(device)!r} is not to be had here ({reason}); try --device cpu") from error
    return place


def join(device: str | torch.device) -> Processes:
    """Meet the other processes, if the launcher started several: gloo between CPUs, NCCL between GPUs.

    Args:
        device: where to train; several processes on "cuda" each take the GPU of their local rank.

    Raises:
        FanalError: there is no such device, or several processes were started without accelerate installed.
    """
    place = check_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(place)
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise FanalError("training in several processes needs accelerate: pip install 'fanal[train]'") from error
    state = PartialState(cpu=place.type == "cpu")
    atexit.register(state.destroy_process_group)
    where = place if place.type == "cpu" or state.device is None else state.device
    return Processes(where, state.process_index, state.num_processes)
