"""The derivatives of what a data set's exact denoiser and density are, without holding a weight per point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fanal.exact.gaussian import accumulator
from fanal.exact.streaming import Query, moments, stream

if TYPE_CHECKING:
    from fanal.exact.dataset import Dataset

__all__ = ["Denoise", "Density"]


class Denoise(torch.autograd.Function):
    """The denoiser with its derivatives `Cov_w(y)/sigma²` in x and `−(2/sigma)·Cov_w(l, y)` in sigma, streamed."""

    @staticmethod
    def forward(x: Tensor, sigma: Tensor, data: Dataset, labels: Tensor | None) -> Tensor:
        found = data._sums(data._query(x, sigma, labels))
        return found.mean.to(x.dtype).reshape(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, sigma, data, labels = inputs
        ctx.save_for_backward(x, sigma)
        ctx.save_for_forward(x, sigma)
        ctx.data, ctx.labels = data, labels

    @staticmethod
    def _moments(ctx: Any, vector: Tensor) -> tuple[Query, Tensor, dict[str, Tensor]]:
        x, sigma = ctx.saved_tensors
        with torch.no_grad():
            query = ctx.data._query(x.detach(), sigma.detach(), ctx.labels).to(accumulator(x))
            sums = stream(ctx.data.points, query)
            return query, sums.mean, moments(ctx.data.points, query, sums.log_sum, vector.flatten(1))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        x, sigma = ctx.saved_tensors
        if torch.is_grad_enabled() and (x.requires_grad or sigma.requires_grad or grad.requires_grad):
            return _second(ctx, grad, x, sigma)
        query, mean, m = Denoise._moments(ctx, grad)
        by_x = by_sigma = None
        if ctx.needs_input_grad[0]:
            by_x = ((m["ay"] - m["a"][:, None] * mean) / query.level**2).to(x.dtype).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            each = -2 / query.level[:, 0] * (m["al"] - m["a"] * m["l"])
            by_sigma = (each if sigma.ndim else each.sum()).to(sigma.device, sigma.dtype)
        return by_x, by_sigma, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, sigma = ctx.saved_tensors
        along_x, along_sigma = tangents[0], tangents[1]
        query, mean, m = Denoise._moments(ctx, torch.zeros_like(x) if along_x is None else along_x)
        out = (m["ay"] - m["a"][:, None] * mean) / query.level**2
        if along_sigma is not None:
            rate = torch.as_tensor(along_sigma).to(out).reshape(-1, 1)
            out = out - 2 / query.level * rate * (m["ly"] - m["l"][:, None] * mean)
        return out.to(x.dtype).reshape(x.shape)


def _second(ctx: Any, grad: Tensor, x: Tensor, sigma: Tensor) -> tuple[Tensor | None, ...]:
    """The derivatives as differentiable functions, for a derivative of them."""
    wanted = [value for value, needed in zip((x, sigma), ctx.needs_input_grad, strict=False) if needed]
    logits, y = ctx.data._dense(x, sigma, ctx.labels)
    out = (torch.softmax(logits, 1) @ y).to(x.dtype).reshape(x.shape)
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None, None


class Density(torch.autograd.Function):
    """The log density with its derivatives `(D − x)/sigma²` in x and `−(2·E_w l + d)/sigma` in sigma.

    The logits are `l = −‖x − y‖²/2sigma²`, so that their mean is `log Σ exp l − entropy`.
    """

    @staticmethod
    def forward(x: Tensor, sigma: Tensor, data: Dataset, labels: Tensor | None) -> Tensor:
        query = data._query(x, sigma, labels)
        return data._density(query, data._sums(query).log_sum)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, sigma, data, labels = inputs
        ctx.save_for_backward(x, sigma)
        ctx.data, ctx.labels = data, labels

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        x, sigma = ctx.saved_tensors
        level = sigma.to(x.device, accumulator(x)).expand(len(x))
        by_x = by_sigma = None
        if ctx.needs_input_grad[0]:
            pull = (ctx.data(x, sigma, ctx.labels) - x).flatten(1).to(grad)
            by_x = (grad / level**2)[:, None] * pull
            by_x = by_x.to(x.dtype).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            each = -grad * (2 * _mean_logit(ctx, x, sigma) + ctx.data.points.dim) / level
            by_sigma = (each if sigma.ndim else each.sum()).to(sigma.device, sigma.dtype)
        return by_x, by_sigma, None, None


def _mean_logit(ctx: Any, x: Tensor, sigma: Tensor) -> Tensor:
    """The posterior mean of the logits: as a differentiable function where a derivative of it may be asked for."""
    if torch.is_grad_enabled() and (x.requires_grad or sigma.requires_grad):
        logits, _ = ctx.data._dense(x, sigma, ctx.labels)
        return (torch.softmax(logits, 1) * torch.where(logits.isneginf(), 0.0, logits)).sum(1)
    with torch.no_grad():
        found = ctx.data._sums(ctx.data._query(x, sigma, ctx.labels), entropy=True)
        return found.log_sum - found.entropy
