"""The package's own small feature network: what it is, and where its weights are."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fanal.errors import FanalError, reason
from fanal.files import read_json, read_tensors

__all__ = ["FEATURES", "SIDE", "WEIGHTS", "FeatureNet", "load_network"]

SIDE = 32
FEATURES = 64
WEIGHTS = Path(str(resources.files("fanal") / "metrics" / "weights" / "features32.safetensors"))
"""The embedded weights; the card beside them says how they were made."""

_WIDTHS = (16, 32, 64, 96)


def _convolution(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.GroupNorm(after // 8, after), nn.SiLU()
    )


class FeatureNet(nn.Module):
    """A small convolutional network: gray images of 32 x 32 pixels in, 64 features out.

    Four stages of 16 to 96 channels at 32, 16, 8 and 4 pixels, the last two with a second convolution; mean and maximum
    over the last stage's pixels; a linear layer, whose outputs are the features, scaled to mean 0 and standard
    deviation 1 over the training pictures.
    """

    def __init__(self) -> None:
        super().__init__()
        layers, before = [], 1
        for i, width in enumerate(_WIDTHS):
            layers.append(_convolution(before, width, 1 if i == 0 else 2))
            if i >= 2:
                layers.append(_convolution(width, width, 1))
            before = width
        self.body = nn.Sequential(*layers)
        self.last = nn.Linear(2 * before, FEATURES)

    def forward(self, x: Float[Tensor, "n 1 32 32"]) -> Float[Tensor, "n 64"]:
        """Return the features of images in [-1, 1]."""
        seen = self.body(x)
        return self.last(torch.cat([seen.mean((2, 3)), F.adaptive_max_pool2d(seen, 1).flatten(1)], 1))


def load_network(path: Path = WEIGHTS) -> tuple[FeatureNet, str]:
    """Load the feature network, in evaluation mode, and the sha256 of its weights' file.

    Raises:
        FanalError: a file is missing or damaged, or the weights are not those that the card names.
    """
    card = read_json(path.with_suffix(".json"))
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise FanalError(f"cannot read {path}: {reason(error)}") from error
    if card.get("sha256") != digest:
        raise FanalError(f"{path} is not the file that its card describes (sha256 differs): install fanal again")
    with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away
        net = FeatureNet()
    tensors, _ = read_tensors(path, {name: tuple(value.shape) for name, value in net.state_dict().items()})
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False), digest
