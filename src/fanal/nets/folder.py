"""The model folder: `model.safetensors` (weights) and `model.json` (what network they belong to, and a card)."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from fanal.errors import FanalError, reason, unknown_name
from fanal.files import read_json, read_tensors, sha256_of, write_json, write_tensors
from fanal.nets.adm import DhariwalUNetConfig
from fanal.nets.edm import SongUNetConfig
from fanal.nets.mlp import MLPConfig
from fanal.nets.preconditioning import NetConfig, Preconditioned
from fanal.nets.unet import UNetConfig

__all__ = [
    "ARCHITECTURES",
    "config_from_dict",
    "config_to_dict",
    "load_model",
    "read_card",
    "save_model",
]

ARCHITECTURES: dict[str, type[NetConfig]] = {
    "mlp": MLPConfig,
    "unet": UNetConfig,
    "song": SongUNetConfig,
    "dhariwal": DhariwalUNetConfig,
}

_FORMAT = "fanal-model-1"
_JSON_BYTES = 2**20
_PARAMETERS = 2**30
_NUMBERS = ("sigma_data", "sigma_min", "sigma_max")
_KEYS = {"format", "architecture", "config", "shape", "classes", "preconditioning", "sha256", "card", *_NUMBERS}


def config_to_dict(config: NetConfig) -> dict[str, Any]:
    """Describe a network as plain JSON values: `{"architecture": name, **fields}`."""
    name = next(name for name, kind in ARCHITECTURES.items() if isinstance(config, kind))
    fields = dataclasses.asdict(config)
    return {"architecture": name} | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def config_from_dict(description: dict[str, Any]) -> NetConfig:
    """Build a network's configuration from what `config_to_dict` wrote.

    Raises:
        FanalError: an unknown architecture or field, or a value out of range.
    """
    fields = dict(description)
    name = fields.pop("architecture", None)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise unknown_name("architecture", str(name), ARCHITECTURES)
    kind = ARCHITECTURES[name]
    known = {field.name: field.default for field in dataclasses.fields(kind)}
    for key in fields:
        if key not in known:
            raise unknown_name(f"field of {kind.__name__}", str(key), known)
        if isinstance(known[key], tuple) is not isinstance(fields[key], (list, tuple)):
            raise FanalError(f"{kind.__name__}.{key} must look like {known[key]!r}, got {fields[key]!r:.80}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return kind(**values)


def save_model(folder: str | os.PathLike[str], model: Preconditioned, card: dict[str, Any]) -> None:
    """Write a model folder; weights first, so that a folder with a `model.json` is complete.

    Args:
        folder: where to write; made if it is missing.
        model: the denoiser.
        card: anything JSON can hold that a user of the model should know (data, recipe, losses, license).

    Raises:
        FanalError: the card is not JSON or is larger than 1 MiB, or the folder cannot be written.
    """
    path = Path(folder)
    description = config_to_dict(model.config)
    content = {
        "format": _FORMAT,
        "architecture": description.pop("architecture"),
        "config": description,
        "shape": list(model.shape),
        **{name: getattr(model, name) for name in _NUMBERS},
        "classes": model.classes,
        **({} if model.preconditioning == "edm" else {"preconditioning": model.preconditioning}),
        "sha256": "",
        "card": card,
    }
    try:
        size = len(json.dumps(content, allow_nan=False, indent=2))
    except (TypeError, ValueError) as error:
        raise FanalError(f"a model's card must be plain JSON without NaN or infinity: {error}") from error
    if size > _JSON_BYTES - 100:
        raise FanalError(f"the model's description takes {size} bytes, at most {_JSON_BYTES}: shorten the card")
    write_tensors(path / "model.safetensors", model.state_dict())
    content["sha256"] = sha256_of(path / "model.safetensors")
    write_json(path / "model.json", content)


def load_model(folder: str | os.PathLike[str]) -> Preconditioned:
    """Load a model folder: evaluation mode, on the CPU, in the dtype it was saved in.

    The folder may come from anywhere: sizes are bounded before anything is allocated, and no code is run.

    Raises:
        FanalError: a file is missing, damaged or hostile, or the weights are not those of the described network.
    """
    path = Path(folder)
    content = _read_json(path)
    if not isinstance(content["config"], dict):
        raise FanalError(f"{path / 'model.json'}: config must be an object, got {content['config']!r:.80}")
    model = _skeleton(path, content)
    expected = model.state_dict()
    weights = path / "model.safetensors"
    size = sum(tensor.numel() for tensor in expected.values())
    try:
        actual = weights.stat().st_size
        # 8 bytes a value, and room for the header.
        digest = sha256_of(weights) if actual <= 8 * size + 2**20 else ""
    except OSError as error:
        raise FanalError(f"cannot read {weights}: {reason(error)}") from error
    if actual > 8 * size + 2**20:
        raise FanalError(f"{weights} has {actual} bytes, but the network described beside it has {size} parameters")
    tensors, _ = read_tensors(weights, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    if digest != content["sha256"]:
        raise FanalError(
            f"{weights} is not the file that model.json describes (sha256 differs): fetch the folder again"
        )
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64, torch.float16, torch.bfloat16}:
        raise FanalError(f"{weights}: weights must share one floating dtype, got {sorted(map(str, dtypes))}")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise FanalError(f"{weights} holds NaN or infinity: the training diverged or the file is damaged")
    numbers = {name: getattr(model, name) for name in _NUMBERS}
    with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away: leave the caller's generator alone
        model = Preconditioned(
            model.config, model.shape, classes=model.classes, preconditioning=model.preconditioning, **numbers
        ).to(dtypes.pop())
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def read_card(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the card of a model folder.

    Raises:
        FanalError: `model.json` is missing, damaged or not a model's.
    """
    return _read_json(Path(folder))["card"]


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "model.json"
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise FanalError(f"{path} is larger than {_JSON_BYTES} bytes: not a model description")
        content = read_json(path)
    except FanalError:
        raise
    except OSError as error:
        raise FanalError(f"{folder} is not a model folder: cannot read model.json ({error.strerror})") from error
    except ValueError as error:  # a number of thousands of digits
        raise FanalError(f"{path} is not a model description: {error}") from error
    if content.get("format") != _FORMAT:
        raise FanalError(f"{path} is not a model description: expected an object with format {_FORMAT!r}")
    content.setdefault("preconditioning", "edm")  # folders leave the most common one out
    if content.keys() != _KEYS:
        raise FanalError(
            f"{path}: keys should be {sorted(_KEYS)}, these differ: {sorted(content.keys() ^ _KEYS)!r:.200}"
        )
    if not isinstance(content["card"], dict):
        raise FanalError(f"{path}: card must be an object, got {content['card']!r:.80}")
    return content


def _skeleton(folder: Path, content: dict[str, Any]) -> Preconditioned:
    """Build the described network without memory for its weights, and refuse what is absurdly large."""
    path = folder / "model.json"
    shape, numbers = content["shape"], {name: content[name] for name in _NUMBERS}
    if not isinstance(shape, list) or len(shape) > 8:
        raise FanalError(f"{path}: shape must be a list of at most 8 sizes, got {shape!r:.80}")
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
            raise FanalError(f"{path}: {name} must be a number below 1e9, got {value!r:.80}")
    try:
        config = config_from_dict({**content["config"], "architecture": content["architecture"]})
        with torch.device("meta"):
            model = Preconditioned(
                config,
                tuple(shape),
                classes=content["classes"],
                preconditioning=content["preconditioning"],
                **numbers,
            )
    except FanalError as error:
        raise FanalError(f"{path}: {error}") from error
    size = sum(tensor.numel() for tensor in model.state_dict().values())
    if size > _PARAMETERS:
        raise FanalError(f"{path} describes a network of {size} parameters, at most {_PARAMETERS} are allowed")
    return model
