"""The tensors of guided-diffusion and consistency-models checkpoints: sizes read off shapes, names, orders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from fanal.errors import FanalError
from fanal.nets.adm import DhariwalUNet
from fanal.nets.blocks import Block

__all__ = ["Shapes", "Sizes", "compare", "interleaved", "names_of", "sizes_of"]

Shapes = Mapping[str, tuple[int, ...]]
"""Name → shape of each tensor of a file."""

_INPUT, _OUTPUT = "input_blocks.0.0.weight", "out.2.weight"
_MOST = 256  # output blocks
_BLOCK = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}
_OUTER = {
    "map_layer0": "time_embed.0",
    "map_layer1": "time_embed.2",
    "map_label": "label_emb",
    "out_norm": "out.0",
    "out_conv": "out.2",
}


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a checkpoint's tensors tell.

    Attributes:
        base: channels that the multipliers refer to.
        embedding: length of the embedding, in `base`.
        widths: channels, per level.
        blocks: residual blocks per level.
        attends: the levels that attend.
        classes: number of classes; 0 for none.
        channels: of the image.
        variance: whether the output holds a learned variance too.
        scale_shift: whether the embedding scales and shifts.
    """

    base: int
    embedding: int
    widths: tuple[int, ...]
    blocks: int
    attends: tuple[int, ...]
    classes: int
    channels: int
    variance: bool
    scale_shift: bool

    @property
    def mults(self) -> tuple[int | float, ...]:
        """Multipliers of the channels, whole where they can be."""
        return tuple(w // self.base if w % self.base == 0 else w / self.base for w in self.widths)


def sizes_of(shapes: Shapes) -> Sizes:
    """Infer the architecture from the shapes of a checkpoint's tensors.

    Raises:
        FanalError: it is that of a classifier, an upsampler, a network that resamples by convolutions, or another one.
    """
    if _OUTPUT not in shapes or "output_blocks.0.0.in_layers.0.weight" not in shapes:
        raise FanalError("it has no output_blocks or out.2.weight: a classifier, or another network")
    if any(name.endswith((".op.weight", ".conv.weight")) for name in shapes):
        raise FanalError("it resamples by convolutions; only networks with resblock_updown=True are read")
    channels, outputs = _axes(shapes, _INPUT, 4)[1], _axes(shapes, _OUTPUT, 4)[0]
    if outputs not in (channels, 2 * channels) or channels == outputs == 6:
        raise FanalError(f"it maps {channels} channels to {outputs}: an upsampler, or another network, is not read")
    base, embedding = _axes(shapes, "time_embed.0.weight", 2)[1], _axes(shapes, "time_embed.2.weight", 2)[0]
    count = next(i for i in range(_MOST + 1) if i == _MOST or f"output_blocks.{i}.0.in_layers.0.weight" not in shapes)
    ups = sum(f"output_blocks.{i}.{k}.in_layers.0.weight" in shapes for i in range(count) for k in (1, 2))
    levels = 1 + ups
    if count == _MOST or count % levels or count < 2 * levels:
        raise FanalError(f"its {count} output blocks and {levels} levels do not fit together")
    blocks = count // levels - 1
    starts = [1 + level * (blocks + 1) for level in range(levels)]
    widths = tuple(_axes(shapes, f"input_blocks.{i}.0.in_layers.2.weight", 4)[0] for i in starts)
    told = _axes(shapes, "input_blocks.1.0.emb_layers.1.weight", 2)[0]
    if not base or embedding % base or told not in (widths[0], 2 * widths[0]):
        raise FanalError(f"its embedding of {embedding} for {base} channels, or {told} for {widths[0]}, does not fit")
    return Sizes(
        base=base,
        embedding=embedding // base,
        widths=widths,
        blocks=blocks,
        attends=tuple(level for level, i in enumerate(starts) if f"input_blocks.{i}.1.qkv.weight" in shapes),
        classes=_axes(shapes, "label_emb.weight", 2)[0] if "label_emb.weight" in shapes else 0,
        channels=channels,
        variance=outputs == 2 * channels,
        scale_shift=told == 2 * widths[0],
    )


def _axes(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that each such network has."""
    if len(shapes.get(name, ())) != axes:
        raise FanalError(f"the tensor {name} should have {axes} axes, it has shape {shapes.get(name, 'none')}")
    return shapes[name]


def names_of(net: DhariwalUNet) -> Iterator[tuple[str, str]]:
    """Pair fanal's name of each parameter with that in the file."""
    homes = dict(_OUTER)
    for i, (name, layer) in enumerate(net.enc.items()):
        homes |= _homes(f"enc.{name}", layer, f"input_blocks.{i}", 0)
    count, place = -1, 0
    for name, layer in net.dec.items():
        if name.endswith(("_in0", "_in1")):
            homes |= _homes(f"dec.{name}", layer, "middle_block", 2 * int(name.endswith("_in1")))
        elif name.endswith("_up"):
            homes |= _homes(f"dec.{name}", layer, f"output_blocks.{count}", place)
        else:
            count += 1
            place = 2 if cast(Block, layer).heads else 1
            homes |= _homes(f"dec.{name}", layer, f"output_blocks.{count}", 0)
    for name, _ in net.named_parameters():
        home, _, last = name.rpartition(".")
        yield name, f"{homes[home]}.{last}"


def _homes(name: str, layer: nn.Module, theirs: str, place: int) -> dict[str, str]:
    """The layers of one block, or a lone convolution, at a place within a list of the file's."""
    if not isinstance(layer, Block):
        return {name: f"{theirs}.{place}"}
    inner = {f"{name}.{own}": f"{theirs}.{place}.{other}" for own, other in _BLOCK.items()}
    attention = {f"{name}.{own}": f"{theirs}.{place + 1}.{other}" for own, other in _ATTENTION.items()}
    return inner | attention


def compare(expected: Shapes, found: Shapes) -> None:
    """Refuse a file that lacks a tensor, has one too many, or one of another shape.

    Args:
        expected: fanal's shapes, under the names in the file.
        found: the shapes in the file.

    Raises:
        FanalError: they differ.
    """
    odd = sorted(expected.keys() ^ found.keys())
    if odd:
        what = "is missing" if odd[0] in expected else "is no part of this network"
        raise FanalError(f"the tensor {odd[0][:80]!r} {what}; in all, {len(odd)} are missing or too many")
    for name, shape in expected.items():
        if name == "label_emb.weight":
            shape = shape[::-1]
        line = shape[:3] if name.endswith(("qkv.weight", "proj_out.weight")) else shape  # a convolution over one axis
        if found[name] not in (shape, line):
            raise FanalError(f"the tensor {name} should have shape {shape}, it has {found[name]}")


def interleaved(value: Tensor, heads: int, order: str) -> Tensor:
    """Reorder the output channels of a qkv layer to fanal's (head, channel, qkv).

    Args:
        value: weight or bias of the layer.
        heads: attention heads.
        order: `legacy` (head, qkv, channel) or `new` (qkv, head, channel).
    """
    rest = value.shape[1:]
    if order == "legacy":
        return value.reshape(heads, 3, -1, *rest).transpose(1, 2).flatten(0, 2)
    return value.reshape(3, heads, -1, *rest).movedim(0, 2).flatten(0, 2)
