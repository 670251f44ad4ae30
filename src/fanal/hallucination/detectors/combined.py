"""Several detectors as one: a logistic regression on the logarithms of their risks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.denoiser import Denoiser
from fanal.errors import FanalError, is_number
from fanal.hallucination.detectors.watching import Detector, Watch, begin
from fanal.sampling import Transition

__all__ = ["Combined", "Part"]

_LIMIT = 64  # parts; what a file asks for is built, so it is bounded


@dataclass(frozen=True)
class Part:
    """One detector of a combination.

    Attributes:
        detector: what gives the risk.
        floor: smallest risk that is told from smaller ones, above 0, so that its logarithm exists.
        center: mean of the log risks that the weights were fitted on.
        scale: their standard deviation.
        weight: of the standardized log risk.
    """

    detector: Detector
    floor: float
    center: float
    scale: float
    weight: float

    def __post_init__(self) -> None:
        numbers = (self.floor, self.center, self.scale, self.weight)
        if not all(map(is_number, numbers)) or not self.floor > 0 or not self.scale > 0:
            raise FanalError(f"a part needs floor > 0, center, scale > 0 and weight, all finite, got {numbers!r:.80}")

    def logs(self, risk: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Return its share of the log odds."""
        return self.weight * (risk.double().clamp(min=self.floor).log() - self.center) / self.scale


class _CombinedWatch:
    def __init__(self, combined: Combined, watches: list[Watch]) -> None:
        self.combined, self.watches = combined, watches

    def see(self, transition: Transition) -> None:
        for watch in self.watches:
            watch.see(transition)

    def per_step(self) -> Tensor:
        steps = [watch.per_step() for watch in self.watches]
        ready = torch.stack([(step != 0).any(1) for step in steps]).all(0)
        # row by row, so that the last one has the very bits of the risk
        rows = torch.stack([self.combined.join(list(row)) for row in zip(*steps, strict=True)])
        return torch.where(ready[:, None], rows, torch.zeros(()).double())

    def risk(self) -> Tensor:
        return self.combined.join([watch.risk() for watch in self.watches])


@dataclass(frozen=True)
class Combined:
    """The probability of being wrong, by a logistic regression on the log risks of several detectors.

    `p = 1/(1 + exp(−b − Σ_k w_k·(log max(r_k, floor_k) − center_k)/scale_k))`. It is a probability for the model, grid
    and solver that it was fitted for; elsewhere it is a risk like any other. `fanal.hallucination.combination.fit`
    makes it from labels.

    Attributes:
        parts: what is combined.
        intercept: b.
    """

    parts: tuple[Part, ...]
    intercept: float
    kind: ClassVar[str] = "combined"

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple) or not 0 < len(self.parts) <= _LIMIT or not is_number(self.intercept):
            raise FanalError(f"a combination needs 1 to {_LIMIT} parts and a finite intercept, got {self!r:.80}")

    @property
    def window(self) -> tuple[float, float]:
        """The smallest range of sigma that holds all its parts' windows."""
        windows = [part.detector.window for part in self.parts]
        return min(low for low, _ in windows), max(high for _, high in windows)

    @property
    def free(self) -> bool:
        """Whether all its parts are free."""
        return all(part.detector.free for part in self.parts)

    def start(self, denoiser: Denoiser | None = None) -> Watch:
        """Begin to watch a run.

        Raises:
            FanalError: a part asks the network, and no denoiser was given.
        """
        if denoiser is None and not self.free:
            raise FanalError("a part of the combination asks the network itself: start it with the run's denoiser")
        # free parts never look at it
        watches = [part.detector.start() if denoiser is None else begin(part.detector, denoiser) for part in self.parts]
        return _CombinedWatch(self, watches)

    def join(self, risks: list[Tensor]) -> Tensor:
        """Return the probability from the risks of the parts, in their order."""
        odds = sum((part.logs(risk) for part, risk in zip(self.parts, risks, strict=True)), torch.zeros(()).double())
        return torch.sigmoid(odds + self.intercept)

    def to_dict(self) -> dict[str, Any]:
        """Describe it as plain JSON values."""
        from fanal.hallucination.detectors import describe

        parts = [
            describe(part.detector)
            | {"floor": part.floor, "center": part.center, "scale": part.scale, "weight": part.weight}
            for part in self.parts
        ]
        return {"parts": parts, "intercept": self.intercept}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Combined:
        """Read what `to_dict` wrote.

        Raises:
            FanalError: it is not readable.
        """
        try:
            parts = value["parts"]
            if not isinstance(parts, list) or len(parts) > _LIMIT:
                raise ValueError(f"parts is {parts!r:.40}")
            return cls(tuple(_read_part(part) for part in parts), value["intercept"])
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise FanalError(f"no readable combination of detectors ({error})") from error


def _read_part(value: Mapping[str, Any]) -> Part:
    from fanal.hallucination.detectors import build

    if value["detector"] == "combined":
        raise ValueError("a combination holds no further one")
    low, high = (float(v) for v in value["window"])
    options = value["options"]
    if any(math.isnan(v) for v in (low, high)) or not isinstance(options, dict):
        raise ValueError(f"window {value['window']!r:.40}, options {options!r:.40}")
    numbers = [value[name] for name in ("floor", "center", "scale", "weight")]
    return Part(build(value["detector"], (low, high), **options), *numbers)
