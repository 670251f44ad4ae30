"""What the network makes of a finished sample: the numbers that a linear probe reads, and which network it was.

Activations of diffusion models as features: Baranchuk et al. 2022, arXiv 2112.03126.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fanal.denoiser import Denoiser, network_of
from fanal.errors import FanalError

__all__ = ["LAYERS", "digest", "layers_of", "looks", "module_of"]

LAYERS = 64
"""Stages that are read, at most."""


def module_of(denoiser: Denoiser) -> nn.Module | None:
    """Return the torch network at the bottom of a denoiser, or None where there is none."""
    network = network_of(denoiser)
    if not isinstance(network, nn.Module):
        network = getattr(network, "network", None)  # of a pipeline: the part that denoises
    return network if isinstance(network, nn.Module) else None


def _module(denoiser: Denoiser) -> nn.Module:
    network = module_of(denoiser)
    if network is None:
        raise FanalError(
            "a linear probe reads the activations of a torch network, and "
            f"{type(network_of(denoiser)).__name__} is none: use another detector"
        )
    return network


@dataclass(frozen=True)
class _Mark:
    """By what a weight is known to be as it was, without looking at its numbers."""

    name: str
    tensor: ref[Tensor]
    place: int
    version: int

    def holds(self, name: str, value: Tensor) -> bool:
        same = name == self.name and value is self.tensor()
        return same and (value.data_ptr(), value._version) == (self.place, self.version)


_digests: WeakKeyDictionary[nn.Module, tuple[list[_Mark], str]] = WeakKeyDictionary()


def digest(denoiser: Denoiser) -> str:
    """Return a hash of the network's weights: a probe fits no other network.

    It is kept, and computed again once a weight is another tensor or torch has counted a change in place, as
    optimizers and `load_state_dict` make them; a change through `.data` is not counted.

    Raises:
        FanalError: there is no torch network.
    """
    network = _module(denoiser)
    weights = sorted(network.state_dict(keep_vars=True).items())
    marks, found = _digests.get(network, ([], ""))
    if found and len(marks) == len(weights) and all(m.holds(*w) for m, w in zip(marks, weights, strict=True)):
        return found
    whole = hashlib.sha256()
    for name, value in weights:
        whole.update(f"{name} {tuple(value.shape)}".encode())
        whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    if not any(value.is_inference() for _, value in weights):  # torch counts no changes of those
        marks = [_Mark(name, ref(value), value.data_ptr(), value._version) for name, value in weights]
        _digests[network] = marks, whole.hexdigest()
    return whole.hexdigest()


def layers_of(denoiser: Denoiser) -> tuple[str, ...]:
    """Return the names of the network's stages: the outermost items of its module lists, or else of its module dicts.

    Raises:
        FanalError: there is no torch network, or it has neither.
    """
    network, found = _module(denoiser), []
    for kind in (nn.ModuleList, nn.ModuleDict):
        for name, module in network.named_modules():
            if isinstance(module, kind) and not any(name.startswith(f"{above}.") for above in found):
                found += [f"{name}.{item}" for item, _ in module.named_children()]
        if found:
            break
    if not found or len(found) > LAYERS:
        raise FanalError(
            f"the network has {len(found)} stages in module lists, a probe needs 1 to {LAYERS}: name its layers"
        )
    return tuple(found)


def _channels(name: str, out: Any, count: int) -> Float[Tensor, "b c n"]:
    """A stage's output as channels by place, for the samples themselves."""
    whole = next((part for part in out if isinstance(part, Tensor)), None) if isinstance(out, tuple) else out
    if not isinstance(whole, Tensor) or whole.ndim < 3:
        raise FanalError(f"the layer {name!r:.60} gives no channels by place that a probe could read: name others")
    whole = whole[:count]  # under guidance the second half of the batch is without the condition
    return whole.transpose(1, 2) if whole.ndim == 3 else whole.flatten(2)  # a transformer has its tokens first


def looks(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], sigmas: Sequence[float], layers: Sequence[str]
) -> Float[Tensor, "b f"]:
    """Return what the network makes of samples: `log‖D(x, sigma) − x‖` and its channels' means, maxima and spreads.

    Args:
        denoiser: asked once per sigma.
        x: finished samples; no noise is added.
        sigmas: where it is asked.
        layers: names of modules whose outputs are (B, C, *places) or (B, tokens, C), or tuples that begin with those.

    Raises:
        FanalError: there is no torch network, or it has no such layer.
    """
    modules = dict(_module(denoiser).named_modules())
    missing = [name for name in layers if name not in modules]
    if missing:
        raise FanalError(f"the network has no layer {missing[0]!r:.60}: this probe was made for another one")
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            seen.setdefault(name, out)  # of several calls, the first has the condition

        return hook

    hooks = [modules[name].register_forward_hook(keep(name)) for name in layers]
    parts: list[Tensor] = []
    try:
        with torch.no_grad():
            for sigma in sigmas:
                seen.clear()
                away = denoiser(x, torch.tensor(sigma, dtype=torch.float64)) - x
                parts.append(away.flatten(1).norm(dim=1, keepdim=True).clamp(min=1e-12).log())
                for name in layers:
                    channels = _channels(name, seen[name], len(x)).float()
                    parts += [channels.mean(2), channels.amax(2), channels.std(2, unbiased=False)]
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([part.cpu().double() for part in parts], 1)
