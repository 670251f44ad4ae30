"""What the comparisons share: real samples and features to judge by, counts of calls, solvers that draw noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fanal import metrics
from fanal.datasets import DATASETS, Dataset
from fanal.denoiser import Counted, Latent, Model, network_of
from fanal.errors import FanalError
from fanal.metrics.estimates import Estimate
from fanal.metrics.features import is_image
from fanal.metrics.samples import open_samples
from fanal.pictures import to_bytes
from fanal.sampling import Solver, sample
from fanal.summary import as_json

__all__ = ["Judge", "calls_on", "dataset_of", "draws", "short"]

_BLOCK = 128  # images whose features are computed together


def calls_on(solver: Solver, sigmas: Tensor) -> int:
    """Return the network calls that a solver makes on a grid, by counting them on a toy."""
    counted = Counted(lambda x, sigma: x / (1 + sigma**2))
    sample(counted, torch.ones(1, 1, dtype=torch.float64), sigmas, solver, (0,))
    return counted.calls


def draws(solver: Solver) -> bool:
    """Return whether a solver draws noise: whether two seeds end at different points."""
    sigmas = torch.tensor([10.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    x = torch.ones(1, 1, dtype=torch.float64)
    one, other = (sample(lambda x, sigma: x / (1 + sigma**2), x, sigmas, solver, (seed,)) for seed in (0, 1))
    return not torch.equal(one, other)


def dataset_of(about: Mapping[str, Any], model: Model) -> Dataset:
    """Return the data set that a model's card names.

    Raises:
        FanalError: it names none, or one of another shape.
    """
    found = DATASETS.get(str(about.get("data", "")))
    if found is None or (found.shape != tuple(model.shape) and not isinstance(network_of(model), Latent)):
        raise FanalError(
            "quality needs real samples, and the model's card names no data set of fanal; try an embedded model"
        )
    return found


@dataclass(frozen=True, eq=False)
class Judge:
    """Turns samples into features and verdicts, and compares the features with those of real samples.

    Attributes:
        extract: makes the features.
        real: those of the real samples, (M, F).
        dataset: its rule tells right samples from wrong ones; None, or without a rule: nobody does.
        model: decodes its latents; None: samples are what they are.
    """

    extract: metrics.Extractor
    real: Tensor
    dataset: Dataset | None = None
    model: Model | None = None

    @classmethod
    def of(cls, dataset: Dataset, count: int, features: str = "auto", model: Model | None = None) -> Judge:
        """Judge by `count` held-out samples of a data set (or all it has), and by its rule.

        Raises:
            FanalError: the features are unknown.
        """
        return cls._by(_held_out(dataset, count), dataset, features, model)

    @classmethod
    def against(
        cls, real: str, count: int, features: str, model: Model, rule: Dataset | None = None, device: str = "cpu"
    ) -> Judge:
        """Judge by the first `count` real samples from anywhere (or all there are).

        Args:
            real: as `fanal.metrics.samples.open_samples` takes it.
            count: how many.
            features: as in `fanal eval`.
            model: decodes its latents.
            rule: data set whose rule judges the samples too.
            device: where the features are computed.

        Raises:
            FanalError: there are no such samples, or the features are unknown or do not fit them.
        """
        found = open_samples(real)
        return cls._by(found.read(0, min(count, len(found))), rule, features, model, device)

    @classmethod
    def _by(cls, real: Tensor, rule: Dataset | None, features: str, model: Model | None, device: str = "cpu") -> Judge:
        own = "own" if is_image(tuple(real.shape[1:])) else "pixels"
        extract = metrics.extractor(own if features == "auto" else features, device)
        return cls(extract, torch.cat([extract(part) for part in real.split(_BLOCK)]), rule, model)

    @property
    def rule(self) -> bool:
        """Whether there are verdicts."""
        return self.dataset is not None and bool(self.dataset.verdicts)

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, F), and verdicts (N,) bool, all false where nobody knows."""
        network = network_of(self.model) if self.model is not None else None
        with torch.no_grad():
            image = network.decode(x) if isinstance(network, Latent) else x
        right = torch.zeros(len(x), dtype=torch.bool)
        if self.dataset is not None and self.rule:
            right = self.dataset.verify(image.float().cpu()) == 0
        return self.extract(to_bytes(image) if is_image(tuple(image.shape[1:])) else image), right


def _held_out(dataset: Dataset, count: int) -> Tensor:
    try:
        return dataset.data("held out", count).x
    except FanalError:  # a finite set that has fewer
        return dataset.data("held out").x


def short(figure: Mapping[str, Any] | Estimate | None) -> str:
    """Write a figure and its standard error with the digits that the error allows."""
    if figure is None:
        return "–"
    own = as_json(figure) if isinstance(figure, Estimate) else figure
    value, se = own["value"], own["se"]
    if value is None or value != value:
        return "–"
    if se is None or se != se:
        return f"{value:.3g}"
    if se == 0:
        return f"{value:.3g} ± 0"
    digits = 0
    while digits < 6 and se * 10**digits < 2:
        digits += 1
    return f"{value:.{digits}f} ± {max(se, 10.0**-digits):.{digits}f}"
