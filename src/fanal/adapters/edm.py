"""EDM checkpoints: official pickles become fanal's own networks, and the source code inside them is never run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fanal.adapters.pickles import Call, Source, kind_of, read_pickle
from fanal.adapters.storages import PARAMETER, TENSOR, TENSOR_NAMES, read_tensor
from fanal.errors import FanalError, reason, unknown_name
from fanal.nets.folder import config_from_dict, config_to_dict
from fanal.nets.preconditioning import Preconditioned, iddpm_levels, vp_level

__all__ = ["describe_edm", "load_edm"]

_OBJECT = "torch_utils.persistence._reconstruct_persistent_obj"
_MODULES = "torch.nn.modules.container.ModuleDict"
_DICTS = ("collections.OrderedDict", "dnnlib.util.EasyDict")
_SCALARS = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
_DTYPE = "numpy.dtype"
_KNOWN = (
    dict.fromkeys([_OBJECT, *_SCALARS, *TENSOR_NAMES], "")
    | dict.fromkeys(_DICTS, "items")
    | dict.fromkeys([_MODULES, _DTYPE], "state")
)

_FILE_BYTES = 2**32
_PARAMETERS = 2**29
_WALK, _DEPTH = 2**14, 16  # modules in a network, and how deep they nest
_FIRST = {"img_resolution": None, "img_channels": None, "label_dim": 0, "use_fp16": False}
_ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "EDMPrecond": (
        "edm",
        _FIRST | {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5, "model_type": "DhariwalUNet"},
    ),
    "VPPrecond": (
        "vp",
        _FIRST | {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "model_type": "SongUNet"},
    ),
    "VEPrecond": ("ve", _FIRST | {"sigma_min": 0.02, "sigma_max": 100, "model_type": "SongUNet"}),
    "iDDPMPrecond": ("iddpm", _FIRST | {"C_1": 0.001, "C_2": 0.008, "M": 1000, "model_type": "DhariwalUNet"}),
}
_FIXED = ("beta_d", "beta_min", "M", "epsilon_t", "C_1", "C_2")
_NETWORKS = {"SongUNet": "song", "DhariwalUNet": "dhariwal"}


def load_edm(path: str | os.PathLike[str]) -> Preconditioned:
    """Load the network `ema` of an official EDM pickle, on the CPU, in evaluation mode.

    Nothing in the file is run: its source code stays text, and the network is fanal's own, built from the arguments
    that the file records. `D(x, sigma, labels)` is in x-space; labels are whole numbers, and None is no label. An
    unlimited range of noise levels becomes that of EDM's sampler, 0.002 to 80.

    Args:
        path: the `.pkl` file.

    Raises:
        FanalError: the file is missing, cut off, hostile, or no EDM checkpoint.

    Reference: Karras et al. 2022, arXiv:2206.00364.
    """
    return _read(Path(path), weights=True)


def describe_edm(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a card for an official EDM pickle, from the arguments it records; the weights are not read.

    Raises:
        FanalError: the file is missing, cut off, hostile, or no EDM checkpoint.
    """
    model = _read(Path(path), weights=False)
    description = config_to_dict(model.config)
    kind = type(model.net).__name__
    count = sum(parameter.numel() for parameter in model.parameters())
    size = "x".join(map(str, model.shape[1:]))
    conditional = f", {model.classes} classes" if model.classes else ""
    return {
        "summary": f"EDM checkpoint: {kind}, {model.preconditioning}, {size}{conditional}, {count:,} parameters",
        "source": {"format": "EDM pickle", "file": Path(path).name},
        "network": description,
        "preconditioning": model.preconditioning,
        "classes": model.classes,
        "parameters": count,
    }


def _read(path: Path, weights: bool) -> Preconditioned:
    try:
        size = path.stat().st_size
        if not path.is_file() or size > _FILE_BYTES:
            raise FanalError(f"no file, or one of more than {_FILE_BYTES} bytes")
        with open(path, "rb") as file:
            source = Source(file, 0, size)
            head = file.read(2)
            file.seek(0)
            if head[:1] != b"\x80" and head != b"PK":
                raise FanalError("it does not begin like a pickle of protocol 2 or later: it is another kind of file")
            if head == b"PK":
                raise FanalError("the file is a zip archive (torch.save writes those), no EDM pickle")
            network = _network_of(read_pickle(source, _KNOWN))
            if source.position != size:
                raise FanalError(f"{size - source.position} bytes follow the end of the pickle")
            model = _skeleton(network)
            _load(model, network, file if weights else None)
    except OSError as error:
        raise FanalError(f"cannot read {path}: {reason(error)}") from error
    except FanalError as error:
        raise FanalError(f"cannot read {path} as an EDM checkpoint: {error}") from error
    return model.eval().requires_grad_(False)


def _as_dict(value: object, what: str) -> dict[Any, Any]:
    """The items of a dict, an OrderedDict or an EasyDict."""
    if isinstance(value, Call) and value.name in _DICTS and not value.args:
        return dict(value.items)
    if type(value) is not dict:
        raise FanalError(f"{what} should be a dict, got {kind_of(value)}")
    return value


def _state_of(value: object, what: str) -> tuple[str, dict[Any, Any]]:
    """The class name and the attributes of a pickled module."""
    if isinstance(value, Call) and value.name == _MODULES and not value.args:
        return "ModuleDict", _as_dict(value.state, f"the state of {what}")
    if not isinstance(value, Call) or value.name != _OBJECT or len(value.args) != 1:
        raise FanalError(f"{what} should be a network module, got {kind_of(value)}")
    meta = _as_dict(value.args[0], f"the description of {what}")
    name, kind = meta.get("class_name"), meta.get("type")
    if type(name) is not str or type(kind) is not str or kind != "class":
        raise FanalError(f"{what} should be an instance of a class, got {kind_of(kind)} {kind_of(name)}")
    return name, _as_dict(meta.get("state"), f"the state of {what}")


def _network_of(root: object) -> tuple[str, dict[Any, Any]]:
    """The class name and the attributes of the averaged network in a checkpoint."""
    content = _as_dict(root, "the checkpoint")
    if "ema" not in content:
        raise FanalError("the checkpoint has no network 'ema'")
    return _state_of(content["ema"], "ema")


def _plain(value: object, what: str) -> Any:
    """A recorded argument as a plain value: text, a number, None, or a short list of numbers."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)) and len(value) <= 64 and all(type(n) in (int, float) for n in value):
        return tuple(value)
    raise FanalError(f"the argument {what} should be a plain value, got {kind_of(value)}")


def _arguments(state: dict[Any, Any], known: dict[str, Any]) -> dict[str, Any]:
    """What the network was made with: positional arguments by their place, keywords, defaults."""
    given, words = state.get("_init_args", ()), _as_dict(state.get("_init_kwargs"), "_init_kwargs")
    if not isinstance(given, (list, tuple)) or len(given) > len(known):
        raise FanalError(f"_init_args should be a short list, got {kind_of(given)}")
    named = dict(zip(known, given, strict=False))
    if len(words) > 64 or not all(type(word) is str for word in words):
        raise FanalError("_init_kwargs should hold a few arguments by name")
    twice = sorted(named.keys() & words.keys())
    if twice:
        raise FanalError(f"the argument {twice[0]} is given twice")
    return known | {name: _plain(value, name[:60]) for name, value in (named | words).items()}


def _whole(arguments: dict[str, Any], name: str) -> int:
    value = arguments.pop(name)
    if type(value) is not int or not 0 <= value <= 2**16:
        raise FanalError(f"{name} should be a whole number up to 65,536, got {kind_of(value)}")
    return value


def _skeleton(network: tuple[str, dict[Any, Any]]) -> Preconditioned:
    """Build the described network without memory for its weights."""
    name, state = network
    if name not in _ARGUMENTS:
        raise unknown_name("EDM network", name[:60], _ARGUMENTS)
    preconditioning, known = _ARGUMENTS[name]
    arguments = _arguments(state, known)
    side, channels, classes = (_whole(arguments, key) for key in ("img_resolution", "img_channels", "label_dim"))
    arguments.pop("use_fp16")  # says how the official code runs it, not what it is
    for key in _FIXED:
        if key in known and arguments.pop(key) != known[key]:
            raise FanalError(f"{name} was made with another {key} than {known[key]}: only the published one is read")
    numbers = _levels(preconditioning, arguments)
    kind = arguments.pop("model_type")
    if type(kind) is not str or kind not in _NETWORKS:
        raise unknown_name("EDM network", kind[:60] if type(kind) is str else kind_of(kind), _NETWORKS)
    config = config_from_dict(arguments | {"architecture": _NETWORKS[kind]})
    with torch.device("meta"):
        model = Preconditioned(
            config, (channels, side, side), classes=classes, preconditioning=preconditioning, **numbers
        )
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    if count > _PARAMETERS:
        raise FanalError(f"the network would have {count} parameters, at most {_PARAMETERS} are allowed")
    return model


def _levels(preconditioning: str, arguments: dict[str, Any]) -> dict[str, float]:
    """The range of noise levels and the data's standard deviation, taken out of the arguments."""
    if preconditioning == "vp":
        return {"sigma_min": vp_level(1e-5), "sigma_max": vp_level(1.0)}
    if preconditioning == "iddpm":
        levels = iddpm_levels()
        return {"sigma_min": float(levels[-2]), "sigma_max": float(levels[0])}
    numbers = {key: arguments.pop(key) for key in ("sigma_min", "sigma_max", "sigma_data") if key in arguments}
    for key, value in numbers.items():
        if type(value) not in (int, float):
            raise FanalError(f"{key} should be a number, got {kind_of(value)}")
    if preconditioning == "edm":
        numbers["sigma_min"] = numbers["sigma_min"] or 0.002
        if numbers["sigma_max"] == float("inf"):
            numbers["sigma_max"] = 80.0
    return numbers


def _tensors(network: tuple[str, dict[Any, Any]]) -> Iterator[tuple[str, object]]:
    """Walk the modules of a network: each tensor's name, and the record of it."""
    waiting: list[tuple[str, dict[Any, Any], int]] = [("", network[1], 0)]
    visited = 0
    while waiting:
        prefix, state, depth = waiting.pop()
        visited += 1
        if visited > _WALK or depth > _DEPTH:
            raise FanalError(f"the network has more than {_WALK} modules, or nests them more than {_DEPTH} deep")
        for kind in ("_parameters", "_buffers"):
            for name, record in _as_dict(state.get(kind), f"{prefix}{kind}").items():
                if record is not None:
                    yield f"{prefix}{_key(name)}", record
        children = _as_dict(state.get("_modules"), f"{prefix}_modules")
        if len(waiting) + len(children) > _WALK:
            raise FanalError(f"the network has more than {_WALK} modules")
        for name, child in children.items():
            if child is not None:
                place = f"{prefix}{_key(name)}"
                waiting.append((f"{place}.", _state_of(child, place)[1], depth + 1))


def _key(name: object) -> str:
    if type(name) is not str or len(name) > 64:
        raise FanalError(f"a module or tensor should have a short name, got {kind_of(name)}")
    return name


def _load(model: Preconditioned, network: tuple[str, dict[Any, Any]], file: BinaryIO | None) -> None:
    """Check that the file holds the network's tensors and no others, and with a file read them into the network."""
    missing = {_official(name): name for name in model.state_dict()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, torch.Tensor] = {}
    records: dict[str, object] = {}
    for name, record in _tensors(network):
        if name not in missing:
            raise FanalError(f"the tensor {name[:120]!r} is no part of this network, or is there twice")
        if not isinstance(record, Call) or record.name not in (PARAMETER, TENSOR):
            raise FanalError(f"{name[:120]} should be a tensor, got {kind_of(record)}")
        records[missing.pop(name)] = record
    if missing:
        raise FanalError(f"the checkpoint lacks {len(missing)} tensors of this network, such as {min(missing)!r}")
    if file is None:
        return
    for name, record in records.items():
        try:
            found[name] = read_tensor(record, file, shapes[name])
        except FanalError as error:
            raise FanalError(f"{_official(name)}: {error}") from error
    model.load_state_dict(found, assign=True)


def _official(name: str) -> str:
    """The name of a tensor in EDM's code: the network is called `model` there."""
    return f"model.{name.removeprefix('net.')}" if name.startswith("net.") else name
