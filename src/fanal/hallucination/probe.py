"""A linear probe: what the network's own activations say about a finished sample.

The network is asked once or twice more, for the finished sample itself at a middle sigma; a logistic regression on the
means, maxima and spreads of its channels over the pixels gives the log odds that the sample is wrong. It is fitted on
labelled samples of calibration seeds. No other network and no real data are needed (activations of diffusion models as
features for few labels: Baranchuk et al. 2022, arXiv 2112.03126).

found = fit(model, x, wrong)
found.probe                # a detector like any other; not free: it asks len(sigmas) times per sample
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fanal import metrics
from fanal.denoiser import Denoiser, take
from fanal.errors import FanalError
from fanal.files import read_tensors, write_tensors
from fanal.hallucination.activations import LAYERS, digest, layers_of, looks, module_of
from fanal.hallucination.thresholds import threshold_at
from fanal.metrics import Estimate
from fanal.sampling import Transition

__all__ = ["SHIPPED", "Fit", "LinearProbe", "fit", "quantiles_of", "read", "shipped", "write"]

_FORMAT = "fanal-probe-1"

SHIPPED = Path(str(resources.files("fanal") / "hallucination" / "probes"))
"""Probes of the embedded models, one file each; a benchmark script says how they were fitted."""


class _ProbeWatch:
    def __init__(self, probe: LinearProbe, denoiser: Denoiser) -> None:
        self.probe, self.denoiser, self.steps = probe, denoiser, 0
        self.end: Tensor | None = None
        self.found: Tensor | None = None

    def see(self, transition: Transition) -> None:
        self.steps, self.end, self.found = self.steps + 1, transition.step.x_next, None

    def per_step(self) -> Tensor:
        risk = self.risk()
        before = torch.zeros(self.steps - 1, len(risk), dtype=torch.float64)
        return torch.cat([before, risk[None]])

    def risk(self) -> Tensor:
        if self.end is None:
            raise FanalError("a linear probe judges finished samples, and has seen no step")
        if self.found is None:
            self.found = self.probe.judge(self.denoiser, self.end)
        return self.found


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Log odds of being wrong, linear in what the network makes of the finished sample.

    Attributes:
        sigmas: where the network is asked, once each.
        layers: whose activations are read.
        center: (F,), means of what `looks` gives, over the samples that it was fitted on.
        scale: (F,), their standard deviations.
        weight: (F,), of the standardized entries.
        bias: log odds at the center.
        network: hash of the network's weights.
        quantiles: (Q,), evenly spaced quantiles of the cross-validated log odds on those samples, first to last.
    """

    sigmas: tuple[float, ...]
    layers: tuple[str, ...]
    center: Float[Tensor, " f"]
    scale: Float[Tensor, " f"]
    weight: Float[Tensor, " f"]
    bias: float
    network: str
    quantiles: Float[Tensor, " q"]
    kind: ClassVar[str] = "probe"
    free: bool = field(default=False, init=False)
    window: tuple[float, float] = field(default=(0.0, 0.0), init=False)

    def __repr__(self) -> str:
        """Name it by what it says, not by where it lies in memory."""
        said = self.to_dict()["content"][:12]
        return f"LinearProbe(sigmas={self.sigmas}, layers={len(self.layers)}, network={self.network[:12]}, {said})"

    def to_dict(self) -> dict[str, Any]:
        """Describe it as plain JSON values: where it looks, at which network, and a hash of its numbers."""
        bias = torch.tensor([self.bias], dtype=torch.float64)
        numbers = torch.cat([self.center, self.scale, self.weight, self.quantiles, bias])
        content = hashlib.sha256(" ".join(self.layers).encode() + numbers.numpy().tobytes()).hexdigest()
        return {"sigmas": list(self.sigmas), "network": self.network, "content": content}

    def of(self, denoiser: Denoiser) -> LinearProbe:
        """Return the probe, if it was fitted to this very network.

        Raises:
            FanalError: it was fitted to another one.
        """
        own = digest(denoiser)
        if own != self.network:
            raise FanalError(
                f"the probe was fitted to the network {self.network[:12]}, this one is {own[:12]}: its odds say "
                "nothing here; fit one with fanal.hallucination.probe.fit"
            )
        return self

    def judge(self, denoiser: Denoiser, x: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
        """Return the log odds of finished samples, for one call of the network per sigma."""
        seen = looks(denoiser, x, self.sigmas, self.layers)
        if seen.shape[1] != len(self.weight):
            raise FanalError(f"the probe has {len(self.weight)} weights, the network gives {seen.shape[1]} numbers")
        # no matrix product: its last bits depend on where the weights lie in memory
        return ((seen - self.center) / self.scale * self.weight).sum(1) + self.bias

    def threshold(self, flag: float) -> float:
        """Return the log odds that a share `flag` of the calibration samples exceeds.

        Raises:
            FanalError: `flag` is not strictly between 0 and 1.
        """
        return threshold_at(self.quantiles, flag)

    def start(self, denoiser: Denoiser | None = None) -> _ProbeWatch:
        """Begin to watch a run of this denoiser.

        Raises:
            FanalError: no denoiser is given, which it has to ask.
        """
        if denoiser is None:
            raise FanalError("a linear probe asks the network: start it with the denoiser of the run")
        return _ProbeWatch(self, denoiser)


@dataclass(frozen=True, eq=False)
class Fit:
    """A probe, and how well it does on samples that it was not fitted to.

    Attributes:
        probe: fitted to all the samples.
        risk: (B,) log odds of each sample by a fit to the other folds.
        auc: area under the ROC curve of `risk`, with DeLong's standard error.
    """

    probe: LinearProbe
    risk: Float[Tensor, " b"]
    auc: Estimate


def quantiles_of(risk: Float[Tensor, " b"]) -> Float[Tensor, " q"]:
    """Return what a probe keeps of the log odds of its calibration samples: 201 quantiles, first to last."""
    return torch.quantile(risk.double(), torch.linspace(0, 1, 201, dtype=torch.float64))


def fit(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    wrong: Tensor,
    *,
    sigmas: Sequence[float] = (0.8, 2.0),
    layers: Sequence[str] = (),
    folds: int = 5,
    strength: float = 0.01,
    block: int = 256,
) -> Fit:
    """Fit a probe to labelled samples, and judge it by cross-validation.

    Args:
        denoiser: the network that made them.
        x: finished samples.
        wrong: (B,) labels; 0 or False is right.
        sigmas: where the network is asked; the defaults suit images in [−1, 1].
        layers: names of its modules; (): `layers_of`.
        folds: parts of the cross-validation, stratified.
        strength: inverse of the regularization, scikit-learn's `C`.
        block: samples computed together.

    Raises:
        FanalError: there is no torch network, or a kind has fewer samples than there are folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    bad = (wrong != 0).cpu().numpy()
    few = int(min(bad.sum(), (~bad).sum()))
    if len(x) != len(bad) or folds < 2 or few < folds:
        raise FanalError(
            f"a probe needs one label per sample and at least {folds} of each kind, got {len(bad)} labels for {len(x)} "
            f"samples and {few} of the rarer kind: label more"
        )
    names = tuple(layers) or layers_of(denoiser)
    blocks = torch.arange(len(x)).split(block)
    seen = torch.cat([looks(take(denoiser, rows), x[rows], sigmas, names) for rows in blocks]).numpy()
    scaler, regression = StandardScaler(), LogisticRegression(C=strength, max_iter=1000)
    parts, model = StratifiedKFold(folds, shuffle=True, random_state=0), make_pipeline(scaler, regression)
    risk = torch.as_tensor(cross_val_predict(model, seen, bad, cv=parts, method="decision_function"))
    model.fit(seen, bad)
    own = (np.asarray(scaler.mean_), np.asarray(scaler.scale_), np.asarray(regression.coef_)[0])
    center, scale, weight = (torch.from_numpy(np.ascontiguousarray(numbers)).double() for numbers in own)
    probe = LinearProbe(
        tuple(map(float, sigmas)),
        names,
        center,
        scale,
        weight,
        float(np.asarray(regression.intercept_)[0]),
        digest(denoiser),
        quantiles_of(risk),
    )
    return Fit(probe, risk, metrics.auc(risk, torch.from_numpy(bad)))


def write(path: str | Path, probe: LinearProbe, about: str = "") -> None:
    """Write a probe as safetensors.

    Args:
        path: the file.
        probe: what to write.
        about: how it was fitted, for the reader of the file.

    Raises:
        FanalError: the place cannot be written.
    """
    names = ("center", "scale", "weight", "quantiles")
    tensors = {name: getattr(probe, name) for name in names}
    tensors |= {
        "bias": torch.tensor([probe.bias], dtype=torch.float64),
        "sigmas": torch.tensor(probe.sigmas, dtype=torch.float64),
    }
    header = {"format": _FORMAT, "layers": "\n".join(probe.layers), "network": probe.network, "about": about}
    write_tensors(Path(path), tensors, header)


def read(path: str | Path) -> LinearProbe:
    """Read what `write` wrote.

    Raises:
        FanalError: the file cannot be read, or holds no probe.
    """
    tensors, header = read_tensors(Path(path))
    try:
        if header["format"] != _FORMAT:
            raise ValueError(f"format {header['format']!r:.40}")
        wanted = ("center", "scale", "weight", "quantiles", "bias", "sigmas")
        values = {name: tensors[name].double().flatten() for name in wanted}
        layers = tuple(header["layers"].split("\n"))
        sizes = {len(values[name]) for name in ("center", "scale", "weight")}
        finite = all(bool(torch.isfinite(value).all()) and len(value) for value in values.values())
        if len(sizes) != 1 or not finite or len(layers) > LAYERS or len(values["sigmas"]) > LAYERS:
            raise ValueError("its numbers do not fit")
        if not (values["scale"] > 0).all() or not (values["sigmas"] > 0).all():
            raise ValueError("a scale or sigma is not positive")
        return LinearProbe(
            tuple(values["sigmas"].tolist()),
            layers,
            values["center"],
            values["scale"],
            values["weight"],
            float(values["bias"][0]),
            header["network"],
            values["quantiles"],
        )
    except (KeyError, ValueError) as error:
        raise FanalError(f"{path} holds no readable linear probe ({error}): fit it again") from error


@functools.cache
def _shipped() -> tuple[LinearProbe, ...]:
    return tuple(read(file) for file in sorted(SHIPPED.glob("*.safetensors")))


def shipped(denoiser: Denoiser) -> LinearProbe | None:
    """Return the probe that comes with fanal for this very network, or None."""
    network = module_of(denoiser)
    if network is None:
        return None
    stages = set(dict(network.named_modules()))
    # most other networks are told by their stages, without a hash of all their weights
    return next((p for p in _shipped() if stages.issuperset(p.layers) and p.network == digest(denoiser)), None)
