"""`fanal bench gits`: the experiments of [REG] on GITS, on any models whose data fanal knows.

Every study of every model is one block of a run folder. A schedule is judged by where the student ends: how far from
the true end of the same trajectory, and how the samples compare with held-out data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fanal.bench.gits_studies import STUDIES, TRUTH, run
from fanal.bench.gits_subject import Sizes, Subject
from fanal.bench.plans import Found, Outcome, Plan
from fanal.errors import FanalError, unknown_name
from fanal.loading import fingerprint
from fanal.runs import Progress

__all__ = ["GitsConfig"]


@dataclass(frozen=True)
class GitsConfig:
    """What the experiments depend on; written to `run.json`.

    Attributes:
        models: under study; each one's card names its data.
        studies: keys of `STUDIES`; `transfer` is between all the models.
        sizes: of the studies.
        seed: run seed of all samples.
        threads: CPU threads.
    """

    command: ClassVar[str] = "bench gits"

    models: tuple[str, ...]
    studies: tuple[str, ...] = tuple(STUDIES)
    sizes: Sizes = field(default_factory=Sizes)
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.models or len(set(self.models)) < len(self.models):
            raise FanalError(f"name each model once, and at least one, got {', '.join(self.models) or 'none'}")
        if not self.studies:
            raise FanalError(f"nothing to do: choose studies of {', '.join(STUDIES)}")
        for name in self.studies:
            if name not in STUDIES:
                raise unknown_name("study", name, STUDIES)
        if self.threads < 1:
            raise FanalError(f"threads must be at least 1, got {self.threads}")

    def plan(self) -> Plan:
        """Return one block per model for the true ends of its test samples, and one per model and study.

        Raises:
            FanalError: a model's card names no data to compare with.
        """
        subjects = [Subject(name, self.sizes, self.seed) for name in self.models]
        blocks = [
            lambda found, subject=subject, name=name: run(name, subject, found, subjects)
            for subject in subjects
            for name in (TRUTH, *self.studies)
        ]
        return Plan(blocks, _close, "studies", {name: fingerprint(name) for name in self.models})


def _close(found: Sequence[Found], progress: Progress) -> Outcome:
    from fanal.bench.gits_tables import panels, results_of, tables

    results = results_of(found)
    errors = {
        f"{notes['model']}|{notes['study']}|{cell}": values
        for tensors, notes in found
        for cell, values in tensors.items()
        if cell != "ends"
    }
    return Outcome(results, tables(results), panels(results), errors)
