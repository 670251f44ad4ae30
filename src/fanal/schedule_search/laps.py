"""What each stage of a search takes."""

from __future__ import annotations

import time

from fanal.denoiser import Denoiser, evaluations

__all__ = ["Laps"]


class Laps:
    """Seconds and counted calls of each stage.

    Attributes:
        seconds: by stage.
        calls: network calls per sample, by name.

    Args:
        network: what counts them.
    """

    def __init__(self, network: Denoiser) -> None:
        self.network, self.seconds, self.calls = network, dict[str, float](), dict[str, float]()
        self.clock, self.spent = time.perf_counter(), evaluations(network)

    def __call__(self, stage: str, name: str | None = None, samples: int = 1) -> None:
        """End a stage, and begin the next.

        Args:
            stage: whose seconds these were.
            name: whose calls, if any were made.
            samples: among which they are divided.
        """
        now, spent = time.perf_counter(), evaluations(self.network)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.clock
        if name is not None:
            self.calls[name] = (spent - self.spent) / samples
        self.clock, self.spent = time.perf_counter(), spent
