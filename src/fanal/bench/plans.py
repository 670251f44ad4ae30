"""The frame of every comparison: blocks of work in a run folder that can be resumed, then figures, tables and plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fanal.bench.plots import Panel, write_plots
from fanal.files import write_tensors
from fanal.runs import Progress, Run, cpu_threads, quiet

__all__ = ["Comparison", "Found", "Outcome", "Plan", "Settings", "compare", "opened"]

Found = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and notes of one block."""


@dataclass(frozen=True)
class Outcome:
    """What a comparison leaves behind.

    Attributes:
        results: every figure, as plain JSON values.
        tables: the figures as Markdown.
        panels: the figures as plots; none: no page of plots is written.
        tensors: written to `errors.safetensors`; none: no such file.
    """

    results: Mapping[str, Any]
    tables: str
    panels: Sequence[Panel] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The work of a comparison.

    Attributes:
        blocks: what each block computes, given what those before it found; stored one by one.
        close: makes the outcome of all blocks.
        what: a block's name for the user, in the plural.
        identity: what decides the numbers beside the configuration.
    """

    blocks: Sequence[Callable[[Sequence[Found]], Found]]
    close: Callable[[Sequence[Found], Progress], Outcome]
    what: str
    identity: Mapping[str, str] = field(default_factory=dict)


class Settings(Protocol):
    """What a command of `fanal bench` depends on, a frozen dataclass of plain JSON values."""

    command: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def threads(self) -> int:
        """CPU threads."""
        ...


class Comparison(Settings, Protocol):
    """The settings of a comparison."""

    def plan(self) -> Plan:
        """Return the work.

        Raises:
            FanalError: the settings do not work.
        """
        ...


@contextmanager
def opened(
    config: Settings,
    out: str | Path,
    *,
    overwrite: bool,
    say: Callable[[str], None],
    what: str = "blocks",
    identity: Mapping[str, str] | None = None,
) -> Iterator[Run]:
    """Open a run folder with its number of CPU threads, and say how much is there already.

    Args:
        config: decides what a block contains.
        out: the run folder.
        overwrite: replace a finished run.
        say: takes one line for the user.
        what: a block's name for the user, in the plural.
        identity: what decides the numbers beside the configuration.

    Raises:
        FanalError: the place does not work.
    """
    head = dataclasses.asdict(config)
    with cpu_threads(config.threads), Run(out, config.command, head, identity=identity, overwrite=overwrite) as run:
        if run.resumed:
            say(f"resuming: {run.resumed} {what} are there already")
        yield run


def compare(
    config: Comparison,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = quiet,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Run a comparison into a run folder: `run.json`, `tables.md`, and `plots.html` and `errors.safetensors` if it has
    any.

    Args:
        config: what to compare.
        out: the run folder.
        overwrite: replace a finished run.
        progress: wraps loops, given what they do.
        say: takes one line for the user.

    Raises:
        FanalError: the configuration or the place does not work.
    """
    with cpu_threads(config.threads):
        plan = config.plan()
        with opened(config, out, overwrite=overwrite, say=say, what=plan.what, identity=plan.identity) as run:
            found: list[Found] = []
            for i in progress(range(len(plan.blocks)), plan.what):
                found.append(run.block(i, lambda work=plan.blocks[i]: work(found)))
            made = plan.close(found, progress)
            if made.tensors:
                write_tensors(run.path("errors.safetensors"), dict(made.tensors))
            if made.panels:
                write_plots(run.path("plots.html"), f"fanal {config.command}", made.panels)
            run.path("tables.md").write_text(made.tables, encoding="utf-8")
            run.describe({"results": made.results})
            return run.finish()
