"""`fanal bench support`: do guided runs end on the support ([SUP]), and which assumption each failure breaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fanal.bench.plans import Found, Outcome, Plan
from fanal.bench.support_cells import place_of
from fanal.bench.support_hunt import hunt_blocks
from fanal.bench.support_studies import Block, Sizes, blocks_of
from fanal.errors import FanalError, unknown_name
from fanal.exact.named import content
from fanal.loading import fingerprint
from fanal.runs import Progress
from fanal.seeding import run_seeds
from fanal.supports.targets import TARGETS

__all__ = ["STUDIES", "SupportConfig"]

STUDIES = ("grid", "forms", "targets", "errors", "limit", "noise", "interval", "hunt", "hallucination")
"""Names of the studies, in their order."""


@dataclass(frozen=True)
class SupportConfig:
    """What the comparison depends on; written to `run.json`.

    Attributes:
        studies: some of `STUDIES`; "hallucination" needs a model, and is left out of the default without one.
        model: conditional model of data with a rule, for the study "hallucination".
        samples: of each setting of that study.
        steps: of its runs.
        sizes: of the other studies.
        near: distance that counts as on the support, in units of its size.
        seed: run seed.
        threads: CPU threads.
    """

    command: ClassVar[str] = "bench support"

    studies: tuple[str, ...] = STUDIES
    model: str | None = None
    samples: int = 512
    steps: int = 20
    sizes: Sizes = field(default_factory=Sizes)
    near: float = 0.01
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.studies:
            raise FanalError(f"nothing to do: choose studies of {', '.join(STUDIES)}")
        for name in self.studies:
            if name not in STUDIES:
                raise unknown_name("study", name, STUDIES)
        if self.studies == ("hallucination",) and self.model is None:
            raise FanalError("the study hallucination needs a conditional model of data with a rule: give --model")
        if self.samples < 8 or self.sizes.count < 2 or self.steps < 5 or self.threads < 1:
            raise FanalError(
                "samples must be at least 8, count at least 2, steps at least 5 and threads at least 1, got "
                f"{self.samples}, {self.sizes.count}, {self.steps} and {self.threads}"
            )
        if not self.near > 0:
            raise FanalError(f"near must be positive, got {self.near}")

    def _data(self) -> list[str]:
        """Data sets whose points are targets of the chosen studies."""
        sizes = self.sizes
        targets = {name: getattr(sizes, name).targets for name in ("grid", "forms", "targets", "errors", "limit")}
        names = [name for study in self.studies for name in {**targets, "interval": sizes.intervals}.get(study, ())]
        places = dict.fromkeys(place_of(name)[0] for name in names)
        return [place for place in places if place not in TARGETS]

    def _blocks(self, study: str) -> list[Block]:
        first = run_seeds(self.seed, max(self.samples, self.sizes.count, self.sizes.noise)).start
        if study == "hunt":
            return hunt_blocks(self.sizes, first, self.near)
        if study == "hallucination":
            from fanal.bench.support_guided import guided_blocks

            return [] if self.model is None else guided_blocks(self.model, self.samples, self.steps, first)
        return blocks_of(study, self.sizes, first, self.near)

    def plan(self) -> Plan:
        """Return the blocks of all studies, in their order.

        Raises:
            FanalError: the model does not serve.
        """
        blocks = [block for study in STUDIES if study in self.studies for block in self._blocks(study)]
        identity = {} if self.model is None else {"model": fingerprint(self.model)}
        identity |= {name: digest for name in self._data() if (digest := content("data", name))}
        return Plan(blocks, self._close, "blocks", identity)

    def _close(self, found: Sequence[Found], progress: Progress) -> Outcome:
        from fanal.bench.support_results import results_of
        from fanal.bench.support_tables import panels, tables

        results = results_of(found, self.model)
        kept = {
            name: values
            for tensors, notes in found
            if notes["cells"]
            for name, values in tensors.items()
            if name.endswith("|part")
        }
        if self.model is not None:
            from fanal.bench.support_guided import guided_settings

            for (scale, where), own in guided_settings(found).items():
                kept |= {f"w {scale:g}|{where}|{name}": own[name] for name in ("verdict", "asked") if name in own}
        return Outcome(results, tables(results), panels(results), kept)
