"""Trajectory: what one run left behind, recorded from `trace` and kept as safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError
from fanal.files import read_tensors, write_tensors
from fanal.sampling import Transition
from fanal.schedules import check_sigmas

__all__ = ["Trajectory"]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The sampling trajectory and the denoising trajectory of a batch.

    Attributes:
        sigmas: (N+1,) float64, the grid.
        x: (N+1, B, *shape), the state at each sigma.
        denoised: (N, B, *shape), the raw `D(x, sigma)` at the first N of them.
        info: what the solver recorded, by name, each (N, ...); NaN where a step recorded nothing.
        seeds: the samples' seeds, where the run had them.
        meta: words about the run (model, solver, …).
    """

    sigmas: Float[Tensor, " n1"]
    x: Float[Tensor, "n1 b *d"]
    denoised: Float[Tensor, "n b *d"]
    info: Mapping[str, Tensor] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    meta: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.sigmas) - 1
        if len(self.x) != n + 1 or len(self.denoised) != n or self.x.shape[1:] != self.denoised.shape[1:]:
            raise FanalError(
                f"a trajectory over {n} intervals needs x (N+1, B, ...) and denoised (N, B, ...), got "
                f"{tuple(self.x.shape)} and {tuple(self.denoised.shape)}"
            )

    @classmethod
    def record(cls, transitions: Iterable[Transition], meta: Mapping[str, str] | None = None) -> Trajectory:
        """Drain a trace without gradients and keep every state; info that a step lacks is NaN there.

        Raises:
            FanalError: there was no transition.
        """
        with torch.no_grad():
            run = list(transitions)
            if not run:
                raise FanalError("nothing to record: the trace was empty")
            like = {name: value for t in run for name, value in t.step.info.items()}
            return cls(
                sigmas=torch.stack([t.span.sigma for t in run] + [run[-1].span.sigma_next]),
                x=torch.stack([t.x for t in run] + [run[-1].step.x_next]),
                denoised=torch.stack([t.step.denoised for t in run]),
                info={
                    name: torch.stack([t.step.info.get(name, torch.full_like(like[name], torch.nan)) for t in run])
                    for name in sorted(like)
                },
                seeds=run[0].span.seeds,
                meta=dict(meta or {}),
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically.

        Raises:
            FanalError: the place cannot be written.
        """
        tensors = {"sigmas": self.sigmas, "x": self.x, "denoised": self.denoised}
        tensors |= {f"info.{name}": value for name, value in self.info.items()}
        header = {"format": "fanal-trajectory-1", "meta": json.dumps(dict(self.meta))}
        if self.seeds is not None:
            header["seeds"] = json.dumps(self.seeds)
        write_tensors(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            FanalError: the file is missing, truncated, or not a trajectory.
        """
        try:
            tensors, header = read_tensors(Path(path))
            if header.get("format") != "fanal-trajectory-1":
                raise FanalError(f"{path} is not a trajectory that fanal wrote (format {header.get('format')!r})")
            seeds = tuple(json.loads(header["seeds"])) if "seeds" in header else None
            meta = {str(k): str(v) for k, v in json.loads(header.get("meta", "{}")).items()}
            x, denoised, sigmas = tensors.pop("x"), tensors.pop("denoised"), tensors.pop("sigmas")
            info = {name.removeprefix("info."): value for name, value in tensors.items()}
            return cls(check_sigmas(sigmas), x, denoised, info, seeds, meta)
        except FanalError:
            raise
        except (KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise FanalError(f"cannot read the trajectory {path}: {error}; record it again") from error
