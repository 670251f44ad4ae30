"""Checkpoints of guided-diffusion and consistency-models (`.pt`): state dicts become fanal's own networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fanal.adapters.adm_layout import Shapes, Sizes, compare, interleaved, names_of, sizes_of
from fanal.adapters.torchfiles import read_state_dict, read_tensor_records
from fanal.errors import FanalError, unknown_name
from fanal.nets.adm import DhariwalUNet, DhariwalUNetConfig
from fanal.nets.blocks import Block, Convolution
from fanal.nets.folder import config_to_dict
from fanal.nets.preconditioning import Preconditioned, ddpm_levels

__all__ = ["ADM_KINDS", "adm_file", "describe_adm", "load_adm"]

ADM_KINDS = {"adm": "guided-diffusion", "consistency": "consistency-models"}
"""Kind of spec → the repository whose checkpoints it names."""

_PARAMETERS = 2**30
_OPTIONS = {
    "adm": ("size", "heads", "head_channels", "order", "schedule"),
    "consistency": ("size", "heads", "head_channels", "order", "model"),
}
_HEADS = frozenset({"heads", "head_channels"})
_WORDS = {"order": ("legacy", "new"), "schedule": ("cosine", "linear"), "model": ("consistency", "edm")}
# What the two repositories publish, by channels, multipliers and blocks per level.
_PUBLISHED: dict[str, dict[tuple[int, tuple[int | float, ...], int], dict[str, Any]]] = {
    "adm": {
        (192, (1, 2, 3, 4), 3): {"head_channels": 64, "order": "new", "schedule": "cosine"},
        (256, (1, 1, 2, 3, 4), 2): {"heads": 4, "order": "legacy", "schedule": "linear"},
        (256, (1, 1, 2, 2, 4, 4), 2): {"head_channels": 64, "order": "legacy", "schedule": "linear"},
        (256, (0.5, 1, 1, 2, 2, 4, 4), 2): {"head_channels": 64, "order": "legacy", "schedule": "linear"},
    },
    "consistency": {
        (192, (1, 2, 3, 4), 3): {"head_channels": 64, "order": "new"},
        (256, (1, 1, 2, 2, 4, 4), 2): {"head_channels": 64, "order": "new"},
    },
}
_NAMES = {"cd_": "consistency", "ct_": "consistency", "edm_": "edm"}
_LOWEST = 8  # the width of image at the lowest level of each published network


def load_adm(spec: str) -> Preconditioned:
    """Load a guided-diffusion or consistency-models checkpoint, on the CPU, in evaluation mode and float32.

    `adm:FILE.pt` is a noise-predicting network over 1000 times; between two times sigma is interpolated
    (`fanal.nets.preconditioning.ddpm_time`). `consistency:FILE.pt` is an EDM denoiser, or a consistency function. The
    latter is no denoiser: it maps x at any sigma to the end of its trajectory, so that one step from sigma_max into 0
    samples, and the slope (x − D)/sigma means nothing.

    The sizes come from the tensors. What they cannot tell (size, head size, order of the attention's channels, noise
    schedule) comes from the spec, or else from the published settings for these sizes.

    Args:
        spec: `adm:FILE.pt` or `consistency:FILE.pt`, followed by `,name=value` for `size` (width of the image),
            `heads` or `head_channels`, `order` (`legacy` or `new`), and `schedule` (`linear` or `cosine`; adm) or
            `model` (`edm` or `consistency`; consistency).

    Raises:
        FanalError: the file is missing, cut off, hostile or no such checkpoint, or a setting is missing or does not
            fit.

    Reference: Dhariwal & Nichol 2021, arXiv:2105.05233; Song et al. 2023, arXiv:2303.01469.
    """
    plan = _plan(spec)
    model, names = _skeleton(plan)
    tensors = read_state_dict(plan.path)
    found: dict[str, Tensor] = {}
    for name, slot in model.state_dict().items():
        if name not in names:
            found[name] = cast(Tensor, Convolution(4, 4, 0, 1).resample_filter)
            continue
        home = name.rpartition(".")[0]
        value = tensors[names[name]].to(torch.float32, copy=True)
        if home.endswith("qkv"):
            value = interleaved(
                value, cast(Block, model.get_submodule(home.removesuffix(".qkv"))).heads, plan.settings["order"]
            )
        value = (value.T if home.endswith("map_label") else value).reshape(slot.shape).contiguous()
        if not bool(torch.isfinite(value).all()):
            raise FanalError(f"cannot read {plan.path}: {names[name]} holds NaN or infinity: the training diverged")
        found[name] = value
    model.load_state_dict(found, assign=True)
    return model.eval().requires_grad_(False)


def describe_adm(spec: str) -> dict[str, Any]:
    """Return a card for a guided-diffusion or consistency-models checkpoint; its weights are not read.

    `settings` holds what the tensors' sizes cannot tell, and `published` which of these are the published ones for
    networks of these sizes.

    Raises:
        FanalError: as `load_adm`.
    """
    plan = _plan(spec)
    model, _ = _skeleton(plan)
    count = sum(parameter.numel() for parameter in model.parameters())
    conditional = f", {plan.classes} classes" if plan.classes else ""
    what = "consistency function (no denoiser)" if plan.preconditioning == "consistency" else plan.preconditioning
    size = "x".join(map(str, plan.shape[1:]))
    card: dict[str, Any] = {
        "summary": f"{ADM_KINDS[plan.kind]} checkpoint: ADM U-Net, {what}, {size}{conditional}, {count:,} parameters",
        "source": {"format": f"{ADM_KINDS[plan.kind]} state dict", "file": plan.path.name},
        "network": config_to_dict(plan.config),
        "preconditioning": plan.preconditioning,
        "classes": plan.classes,
        "parameters": count,
        "settings": plan.settings,
        "published": sorted(plan.settings.keys() - plan.given),
    }
    if plan.preconditioning == "consistency":
        card["note"] = (
            "D(x, sigma) is a consistency function: it maps x to the end of its trajectory. It is not E[x0 | x]. "
            "Sample with one step from sigma_max into 0; slopes, scores and guidance read off it mean nothing."
        )
    return card


def adm_file(spec: str) -> Path:
    """Return the file that an `adm:` or `consistency:` spec names, without its settings."""
    return _split(spec)[1]


@dataclass(frozen=True)
class _Plan:
    """The network that a spec describes, and where its weights are."""

    kind: str
    path: Path
    config: DhariwalUNetConfig
    shape: tuple[int, int, int]
    classes: int
    preconditioning: str
    settings: dict[str, Any]
    given: frozenset[str]
    shapes: Shapes


def _split(spec: str) -> tuple[str, Path, dict[str, Any]]:
    """The kind, the file and the settings of a spec."""
    from fanal.config import parse_options, split_settings

    kind, _, rest = spec.partition(":")
    path, text = split_settings(rest)
    if not path:
        raise FanalError(f"expected {kind}:FILE.pt, got {spec!r}")
    _, options = parse_options("checkpoint", f"{kind}:{text}", _OPTIONS, lambda name: _OPTIONS[name])
    given: dict[str, Any] = {}
    for name, value in options.items():
        if name in _WORDS:
            if value not in _WORDS[name]:
                raise unknown_name(name, value, _WORDS[name])
            given[name] = value
        elif not value.isascii() or not value.isdigit() or not 1 <= int(value[:9]) <= 2**16:
            raise FanalError(f"{name} must be a whole number from 1 to 65,536, got {value[:40]!r}")
        else:
            given[name] = int(value[:9])
    if given.keys() >= _HEADS:
        raise FanalError("heads and head_channels say the same thing: give one of them")
    return kind, Path(path), given


def _plan(spec: str) -> _Plan:
    kind, path, given = _split(spec)
    shapes = {name: record.shape for name, record in read_tensor_records(path).items()}
    try:
        sizes = sizes_of(shapes)
        settings = _settings(kind, path, sizes, given)
        config = DhariwalUNetConfig(
            model_channels=sizes.base,
            channel_mult=sizes.mults,
            channel_mult_emb=sizes.embedding,
            num_blocks=sizes.blocks,
            attn_resolutions=tuple(settings["size"] >> level for level in sizes.attends),
            dropout=0.0,
            heads=settings.get("heads", 0),
            head_channels=settings.get("head_channels", 64),
            group_channels=1,
            scale_shift=sizes.scale_shift,
            learned_variance=sizes.variance,
            null_label=False,
        )
    except FanalError as error:
        raise FanalError(f"cannot read {path} as a {ADM_KINDS[kind]} checkpoint: {error}") from error
    if kind == "adm":
        preconditioning = f"ddpm_{settings['schedule']}"
    else:
        preconditioning = "edm1000" if settings["model"] == "edm" else "consistency"
    shape = (sizes.channels, settings["size"], settings["size"])
    return _Plan(kind, path, config, shape, sizes.classes, preconditioning, settings, frozenset(given), shapes)


def _settings(kind: str, path: Path, sizes: Sizes, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes cannot tell: from the spec, or else as published for these sizes."""
    published = dict(_PUBLISHED[kind].get((sizes.base, sizes.mults, sizes.blocks), {}))
    levels = len(sizes.widths)
    if sizes.attends == tuple(range(levels))[-3:]:
        published["size"] = _LOWEST << (levels - 1)
    if kind == "consistency":
        published["model"] = next((model for start, model in _NAMES.items() if path.name.startswith(start)), None)
    if given.keys() & _HEADS:
        published = {name: value for name, value in published.items() if name not in _HEADS}
    settings = {name: value for name, value in {**published, **given}.items() if value is not None}
    settled = settings.keys() | (_HEADS if settings.keys() & _HEADS else frozenset())
    for name in _OPTIONS[kind]:
        if name not in settled:
            hint = f" ({' or '.join(_WORDS[name])})" if name in _WORDS else ""
            raise FanalError(
                f"neither its tensors nor published settings say {name}{hint}: add it to the spec, as in "
                f"{kind}:{path.name},{name}=…"
            )
    attending = {sizes.widths[level] for level in sizes.attends} | {sizes.widths[-1]}
    part = settings.get("heads") or settings["head_channels"]
    if any(width % part for width in attending):
        raise FanalError(f"attention over {sorted(attending)} channels cannot be split by {part}: give other heads")
    return settings


def _skeleton(plan: _Plan) -> tuple[Preconditioned, dict[str, str]]:
    """Build the network without memory for its weights; fanal's name of each tensor → that in the file."""
    low, high = 0.002, 80.0
    if plan.kind == "adm":
        levels = ddpm_levels(plan.settings["schedule"])
        low, high = float(levels[0]), float(levels[-1])
    try:
        with torch.device("meta"):
            model = Preconditioned(
                plan.config,
                plan.shape,
                sigma_min=low,
                sigma_max=high,
                classes=plan.classes,
                preconditioning=plan.preconditioning,
            )
        count = sum(parameter.numel() for parameter in model.parameters())
        if count > _PARAMETERS:
            raise FanalError(f"the network would have {count} parameters, at most {_PARAMETERS} are allowed")
        names = {f"net.{own}": theirs for own, theirs in names_of(cast(DhariwalUNet, model.net))}
        compare({names[name]: tuple(value.shape) for name, value in model.named_parameters()}, plan.shapes)
    except FanalError as error:
        raise FanalError(f"cannot read {plan.path} as a {ADM_KINDS[plan.kind]} checkpoint: {error}") from error
    return model, names
