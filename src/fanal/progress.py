"""How far a training is and how long it still takes: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fanal.recipes import Recipe

__all__ = ["left", "training_bar"]

_FIRST, _EVERY = 20.0, 60.0  # seconds between lines where there is no terminal

Advance = Callable[[float], None]


def left(seconds: float) -> str:
    """Say a duration in words, to two figures: "40 s", "12 min", "3.4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def training_bar(recipe: Recipe, start: int, wanted: bool) -> Iterator[Advance]:
    """Show how far a training is; yields what to call with the loss after each step.

    Args:
        recipe: what is trained.
        start: iterations that were done before.
        wanted: whether to show anything.
    """
    if not wanted:
        yield lambda loss: None
    elif sys.stderr.isatty():
        with _bar(recipe, start) as advance:
            yield advance
    else:
        yield _lines(recipe, start)


def _lines(recipe: Recipe, start: int) -> Advance:
    began, done, smooth, due = time.monotonic(), 0, math.nan, _FIRST

    def advance(loss: float) -> None:
        nonlocal done, smooth, due
        done, smooth = done + 1, loss if math.isnan(smooth) else smooth + (loss - smooth) / 50
        elapsed = time.monotonic() - began
        if elapsed < due:
            return
        due = elapsed + _EVERY
        rest = (recipe.iterations - start - done) * elapsed / done
        sys.stderr.write(
            f"{start + done} of {recipe.iterations} iterations, loss {smooth:.4f}, {done / elapsed:.3g} it/s, "
            f"about {left(rest)} left\n"
        )
        sys.stderr.flush()

    return advance


@contextmanager
def _bar(recipe: Recipe, start: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.1f} it/s"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    began, smooth, done = time.perf_counter(), math.nan, 0
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(recipe.data, total=recipe.iterations, completed=start, loss=math.nan, rate=0.0)

        def advance(loss: float) -> None:
            nonlocal smooth, done
            smooth = loss if math.isnan(smooth) else smooth + (loss - smooth) / 50
            done += 1
            progress.update(task, advance=1, loss=smooth, rate=done / (time.perf_counter() - began))

        yield advance
