"""The teacher's run, and the student: the real sampler, run on a candidate grid against the teacher's end points."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Denoiser, Wrapper, take
from fanal.runs import Progress, quiet
from fanal.sampling import Solver, sample, trace
from fanal.schedules import check_sigmas
from fanal.solvers import AFS
from fanal.trajectory import Trajectory

__all__ = ["Replay", "Student", "teach"]


class Replay(Wrapper):
    """Answers from the record of an earlier run as long as the questions are the same, then asks the network.

    A grid that differs from the recorded one from node k on costs only the calls from node k on, for any solver.

    Args:
        denoiser: what to wrap.
        record: `(x, sigma, answer)` in the order of the calls.
    """

    def __init__(self, denoiser: Denoiser, record: list[tuple[Tensor, float, Tensor]] | None = None) -> None:
        super().__init__(denoiser)
        self.old, self.record = record or [], []

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Return the recorded or the network's answer, and record it."""
        k, level = len(self.record), float(sigma)
        if k < len(self.old) and self.old[k][1] == level and torch.equal(self.old[k][0], x):
            answer = self.old[k][2]
        else:
            answer = self.denoiser(x, sigma)
        self.record.append((x, level, answer))
        return answer


def _blocks(count: int, batch: int | None) -> Iterator[Tensor]:
    yield from torch.arange(count).split(batch or count)


def teach(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigmas: Tensor,
    solver: Solver,
    batch: int | None = None,
    progress: Progress = quiet,
    what: str = "teacher",
) -> Trajectory:
    """Record the teacher's run, at most `batch` samples at a time.

    Raises:
        FanalError: as `fanal.trace`.
    """
    parts, bars = list(_blocks(len(x), batch)), range(len(check_sigmas(sigmas)) - 1)
    runs = []
    for i, rows in enumerate(parts):
        note = what if len(parts) == 1 else f"{what}, {i + 1} of {len(parts)}"
        steps = trace(take(denoiser, rows), x[rows], sigmas, solver)
        runs.append(Trajectory.record(step for _, step in zip(progress(bars, note), steps, strict=False)))
    return Trajectory(runs[0].sigmas, torch.cat([r.x for r in runs], 1), torch.cat([r.denoised for r in runs], 1))


class Student:
    """The real sampler on some samples, against where the teacher took them.

    Args:
        denoiser: the network.
        x: (B, *shape), the samples at the first sigma.
        ends: (B, *shape), the teacher's end points.
        batch: samples computed together; None: all.
        afs: whether every solver takes its first step analytically, without a call.
    """

    def __init__(
        self, denoiser: Denoiser, x: Tensor, ends: Tensor, batch: int | None = None, afs: bool = False
    ) -> None:
        self.parts = [(take(denoiser, rows), x[rows]) for rows in _blocks(len(x), batch)]
        self.ends, self.afs = ends.flatten(1), afs
        self.entries = self.ends.shape[1]

    def residual(
        self, sigmas: Tensor, solver: Solver, records: list[list] | None = None
    ) -> tuple[Float[Tensor, "b d"], list[list]]:
        """Return end points minus the teacher's, and the record of the network's answers for the next run.

        Args:
            sigmas: the grid.
            solver: the student's solver.
            records: of an earlier run, to be answered from while nothing has changed.
        """
        found, kept, solver = [], [], self._solver(solver)
        for i, (denoiser, x) in enumerate(self.parts):
            replay = Replay(denoiser, records[i] if records else None)
            found.append(sample(replay, x, sigmas, solver).flatten(1))
            kept.append(replay.record)
        return torch.cat(found) - self.ends, kept

    def errors(self, sigmas: Tensor, solver: Solver) -> Float[Tensor, " b"]:
        """Return each sample's root mean square error per entry, float64 on the CPU."""
        solver = self._solver(solver)
        off = torch.cat([sample(denoiser, x, sigmas, solver).flatten(1) for denoiser, x in self.parts]) - self.ends
        return (torch.linalg.vector_norm(off, dim=1) / self.entries**0.5).cpu().double()

    def _solver(self, solver: Solver) -> Solver:
        return AFS(solver) if self.afs else solver
