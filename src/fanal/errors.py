"""Errors that say what was wrong, what was given and what to try."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

__all__ = ["FanalError", "NonFiniteError", "is_number", "reason", "unknown_name"]


class FanalError(ValueError):
    """An input that fanal cannot work with; the command line prints it and exits with status 2."""


class NonFiniteError(FanalError):
    """A run met NaN or infinity; the message names the step, the sigma and the seeds of the samples."""


def is_number(value: object) -> bool:
    """Whether a value read from a card or a recipe is a finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def reason(error: Exception) -> str:
    """Return why something failed, in words: "No such file or directory", not "[Errno 2] …" with the path once more."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> FanalError:
    """Build the error for a name that is not in a registry, with the nearest known name.

    Args:
        kind: what the name stands for, e.g. `"solver"`.
        name: what was given.
        known: the names that exist.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return FanalError(f"unknown {kind} {name!r}: {hint}known: {', '.join(names)}")
