"""A grid from a file that anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fanal.errors import FanalError, reason
from fanal.schedules.grids import Grid, check_sigmas

__all__ = ["from_file", "holds_many"]

_BYTES, _NODES = 2**20, 10_001


def _read(path: str | Path) -> Any:
    """The value of a JSON file of bounded size.

    Raises:
        FanalError: the file is missing, too large, or no JSON.
    """
    place = Path(path)
    try:
        size = place.stat().st_size
        if size > _BYTES:
            raise FanalError(f"{place} has {size} bytes; a file of sigmas has at most {_BYTES}")
        return json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, FanalError):
            raise
        raise FanalError(f"cannot read {place}: {reason(error)}") from error


def holds_many(path: str | Path) -> bool:
    """Return whether a JSON file is one that `fanal schedule` writes, with several grids and their solver.

    Raises:
        FanalError: the file is missing, too large, or no JSON.
    """
    value = _read(path)
    return isinstance(value, dict) and "schedules" in value


def from_file(path: str | Path) -> Grid:
    """Read a grid from a JSON file: a list of numbers, or an object whose `sigmas` is one.

    The first may be `Infinity`. Nothing in the file is run; its size and length are bounded. A file with several grids,
    as `fanal schedule` writes it, is read by `fanal.schedule_files.read_schedules`.

    Args:
        path: the file.

    Raises:
        FanalError: the file is missing, too large, no JSON, or its numbers are no schedule.
    """
    value = _read(path)
    if isinstance(value, dict) and "schedules" in value:
        raise FanalError(f"{path} holds several grids: read it with fanal.schedule_files.read_schedules")
    numbers = value.get("sigmas") if isinstance(value, dict) else value
    found = numbers if isinstance(numbers, list) else []
    if not 2 <= len(found) <= _NODES or not all(type(number) in (int, float) for number in found):
        raise FanalError(
            f'{path} must hold a list of 2 to {_NODES} numbers, or {{"sigmas": that list}}, for example '
            "[14.6, 3.9, 1.0, 0.3, 0]"
        )
    try:
        return check_sigmas([float(number) for number in found])
    except (FanalError, OverflowError) as error:
        raise FanalError(f"{path}: {error}") from error
