"""Denoisers: any function `D(x, sigma) ≈ E[x0 | x0 + sigma·n = x]`, and what can be read off one.

With `denoised = D(x, sigma)` and n ~ N(0, I):

    score     ∇ log p(x; sigma) = (denoised − x) / sigma²      [REG] lemma 1
    slope     d = dx/dsigma     = (x − denoised) / sigma       the noise prediction, [REG] eq. 11
    Euler     x' = (sigma'/sigma)·x + (1 − sigma'/sigma)·denoised   a convex combination, [REG] eq. 17

`sigma` is a 0-d tensor, or has shape (B,) for one noise level per sample.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError

__all__ = [
    "Conditional",
    "Counted",
    "Denoiser",
    "Labelled",
    "Latent",
    "Model",
    "Native",
    "Prompted",
    "Temperature",
    "Wrapper",
    "counters",
    "evaluations",
    "expand",
    "network_of",
    "score",
    "slope",
    "take",
]


@runtime_checkable
class Denoiser(Protocol):
    """Anything that maps a noisy batch and its noise level to the posterior mean of the clean data."""

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Return E[x0 | x], with the shape and dtype of x."""
        ...


@runtime_checkable
class Conditional(Protocol):
    """A network that also takes class labels: `D(x, sigma, labels)`, labels of shape (B,), int64."""

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None, /) -> Tensor:
        """Return E[x0 | x, label]."""
        ...


@runtime_checkable
class Model(Denoiser, Protocol):
    """A denoiser that knows the shape of a sample and the noise levels it was made for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch axis."""
        ...

    @property
    def sigma_min(self) -> float:
        """Smallest noise level the model was made for."""
        ...

    @property
    def sigma_max(self) -> float:
        """Largest noise level the model was made for."""
        ...


@runtime_checkable
class Prompted(Model, Protocol):
    """A text-to-image network: its labels are indices into the prompts that it was told."""

    @property
    def classes(self) -> int:
        """Number of prompts; as a label it means the negative one."""
        ...

    def with_prompts(self, prompts: Sequence[str], negative: str = "") -> Prompted:
        """Return the network that knows these prompts."""
        ...


@runtime_checkable
class Latent(Model, Protocol):
    """A model whose samples are latents, or pixels on another scale than [−1, 1]."""

    def decode(self, x: Tensor, /) -> Tensor:
        """Return images (B, C, H, W) in [−1, 1]."""
        ...


@runtime_checkable
class Native(Model, Protocol):
    """A network that came with a schedule and a description of its own, such as a diffusers pipeline."""

    def grid(self, steps: int, /) -> Tensor:
        """Return the sigmas that its own scheduler would use, with this many intervals."""
        ...

    def card(self) -> dict[str, Any]:
        """Return what a user should know about it, as plain JSON values."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of its content."""
        ...


def expand(sigma: Tensor, x: Float[Tensor, "b *d"]) -> Tensor:
    """Give a per-sample sigma of shape (B,) the trailing axes of x; a 0-d sigma is returned as it is."""
    return sigma if sigma.ndim == 0 else sigma.reshape(-1, *[1] * (x.ndim - 1))


def score(x: Float[Tensor, "b *d"], denoised: Float[Tensor, "b *d"], sigma: Tensor) -> Float[Tensor, "b *d"]:
    """Return the score `(denoised − x) / sigma²` ([REG] lemma 1, [GEO] lemma 3)."""
    return (denoised - x) / expand(sigma, x) ** 2


def slope(x: Float[Tensor, "b *d"], denoised: Float[Tensor, "b *d"], sigma: Tensor) -> Float[Tensor, "b *d"]:
    """Return `d = dx/dsigma = (x − denoised) / sigma`, the noise prediction ([REG] eq. 11; [RODS] eq. 3 up to sign)."""
    return (x - denoised) / expand(sigma, x)


class Wrapper:
    """Base of Denoiser→Denoiser objects: passes the model's own attributes through."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def parts(self) -> tuple[Denoiser, ...]:
        """Return the denoisers that this one asks."""
        return (self.denoiser,)

    def taking(self, rows: Tensor) -> Denoiser:
        """Return this wrapper for some rows of its batch; see `take`."""
        inner = take(self.denoiser, rows)
        other = self if inner is self.denoiser else copy.copy(self)
        other.denoiser = inner
        return cast(Denoiser, other)

    def _model(self) -> Model:
        if not isinstance(self.denoiser, Model):
            # an AttributeError, so that hasattr and isinstance(…, Model) answer no instead of failing
            raise AttributeError(f"{type(self.denoiser).__name__} does not say its shape, sigma_min and sigma_max")
        return self.denoiser

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self._model().shape

    @property
    def sigma_min(self) -> float:
        """Smallest noise level of the wrapped model."""
        return self._model().sigma_min

    @property
    def sigma_max(self) -> float:
        """Largest noise level of the wrapped model."""
        return self._model().sigma_max


class Counted(Wrapper):
    """Counts network calls: `calls` counts batches, `evaluations` counts samples, `products` backward passes.

    Wrap the network itself, inside every other wrapper, so that nothing escapes the count.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self.calls = 0
        self.evaluations = 0
        self.products = 0

    def _product(self, gradient: Tensor) -> None:
        self.products += 1

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        """Count, then ask the wrapped denoiser; labels go to networks that take them as a third argument.

        A plain number is taken as sigma too, for use by hand.
        """
        sigma = sigma if isinstance(sigma, Tensor) else torch.tensor(sigma, dtype=torch.float64)
        self.calls += 1
        self.evaluations += len(x)
        denoised = self.denoiser(x, sigma) if labels is None else cast(Conditional, self.denoiser)(x, sigma, labels)
        if isinstance(denoised, Tensor) and denoised.requires_grad:
            denoised.register_hook(self._product)
        return denoised


def take(denoiser: Denoiser, rows: Tensor) -> Denoiser:
    """Return the denoiser for some rows of a batch: conditions that are bound one per sample follow their samples.

    Args:
        denoiser: what was bound for the whole batch.
        rows: (R,) int64, indices of the rows.
    """
    return denoiser.taking(rows) if isinstance(denoiser, Wrapper) else denoiser


def network_of(denoiser: Denoiser) -> Denoiser:
    """Return the network at the bottom of a chain of wrappers."""
    while isinstance(denoiser, Wrapper):
        denoiser = denoiser.parts()[0]
    return denoiser


def counters(denoiser: Denoiser) -> list[Counted]:
    """Return every `Counted` inside a chain of wrappers, each once."""
    if isinstance(denoiser, Counted):
        return [denoiser]
    inner = denoiser.parts() if isinstance(denoiser, Wrapper) else ()
    found = [count for part in inner for count in counters(part)]
    return list({id(count): count for count in found}.values())


def evaluations(denoiser: Denoiser) -> int:
    """Return how many samples the networks inside a chain of wrappers were asked for so far."""
    return sum(count.evaluations for count in counters(denoiser))


class Labelled(Wrapper):
    """Binds class labels to a conditional network: one for all samples, or one per sample of the batch.

    Args:
        denoiser: takes labels as its third argument.
        labels: a whole number, or (B,) of them.
    """

    def __init__(self, denoiser: Denoiser, labels: int | Sequence[int] | Tensor) -> None:
        super().__init__(denoiser)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)

    def taking(self, rows: Tensor) -> Denoiser:
        """Return the binding of these rows' labels."""
        return Labelled(self.denoiser, self.labels[rows.to(self.labels.device)]) if self.labels.ndim else self

    def for_batch(self, x: Tensor) -> Tensor:
        """Return one label per sample of x, (B,), on its device.

        Raises:
            FanalError: labels were bound one per sample, for another batch size.
        """
        if self.labels.ndim and len(self.labels) != len(x):
            raise FanalError(f"{len(self.labels)} labels are bound, for a batch of {len(x)}: bind one label for all")
        return self.labels.to(x.device).expand(len(x))

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Return the prediction given the labels.

        Raises:
            FanalError: labels were bound one per sample, for another batch size.
        """
        return cast(Conditional, self.denoiser)(x, sigma, self.for_batch(x))


class Temperature(Wrapper):
    """Lowers the temperature by scaling the residual: `D_κ = D − κ·(x − D)` where sigma lies in `window`.

    An Euler step then moves as if the noise were larger than it is, which draws samples towards the denoised
    prediction: it mends blurred and broken parts, at a price in diversity.

    Args:
        denoiser: what to wrap.
        kappa: strength, dimensionless; 0 changes nothing.
        window: `(low, high)`, the closed range of sigma in which it acts.
    """

    def __init__(self, denoiser: Denoiser, kappa: float, window: tuple[float, float] = (0.0, float("inf"))) -> None:
        super().__init__(denoiser)
        if not window[0] <= window[1]:
            raise FanalError(f"window must be (low, high) in sigma with low <= high, got {window}")
        self.kappa, self.window = kappa, window

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Return `D − κ·(x − D)` inside the window and D outside."""
        denoised = self.denoiser(x, sigma)
        inside = (sigma >= self.window[0]) & (sigma <= self.window[1])
        kappa = self.kappa * inside.to(x.device if sigma.ndim else "cpu", x.dtype)
        return denoised - expand(kappa, x) * (x - denoised)
