"""Networks with known outputs, and pickles of the same structure as official EDM checkpoints.

The classes that are pickled here, and the source text that goes with them, are this file's own: only the names and
the layout are those of the official files.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from fanal.nets import DhariwalUNetConfig, Preconditioned, SongUNetConfig

FIGURES = Path(__file__).parent / "figures" / "edm_networks"
INDEX = json.loads((FIGURES / "index.json").read_text(encoding="utf-8"))["networks"]
PRECONDITIONING = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
KINDS = {"SongUNet": SongUNetConfig, "DhariwalUNet": DhariwalUNetConfig}
TINY = {
    "img_resolution": 4,
    "img_channels": 1,
    "label_dim": 2,
    "model_type": "SongUNet",
    "model_channels": 4,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
    "embedding_type": "fourier",
}


def make(kind, init):
    """fanal's network for the arguments of an official one."""
    init = dict(init)
    side, channels, classes = init.pop("img_resolution"), init.pop("img_channels"), init.pop("label_dim")
    config = KINDS[init.pop("model_type")](**{k: tuple(v) if isinstance(v, list) else v for k, v in init.items()})
    return Preconditioned(config, (channels, side, side), classes=classes, preconditioning=PRECONDITIONING[kind])


def figures(name):
    """The recorded tensors of a reference network: state, inputs, outputs."""
    return load_file(FIGURES / f"{name}.safetensors")


def official(tensors):
    """The state dict under its official names."""
    return {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}


def ours(state):
    """The state dict under fanal's names."""
    return {f"net.{key.removeprefix('model.')}" if key.startswith("model.") else key: v for key, v in state.items()}


def reference(name):
    """A reference network with its weights, and what it must answer."""
    tensors = figures(name)
    model = make(INDEX[name]["class"], INDEX[name]["init"])
    model.load_state_dict(ours(official(tensors)))
    return model.eval().requires_grad_(False), tensors


def tiny_state(kind="EDMPrecond", init=None, seed=0):
    """Random weights for a small network, under their official names."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(kind, init or TINY)
        state = model.state_dict()
        for key, value in model.named_parameters():
            state[key] = 0.3 * torch.randn(value.shape)
    return {f"model.{key.removeprefix('net.')}" if key.startswith("net.") else key: v for key, v in state.items()}


SOURCE = "raise SystemExit('the source text of a checkpoint was run')\n"


def _reconstruct(meta):
    raise SystemExit("a checkpoint was unpickled")


class EasyDict(dict):
    pass


class Persistent(nn.Module):
    """A module that is pickled as official ones are: by its source text, its class name and its attributes."""

    kind = "Conv2d"

    def __reduce__(self):
        meta = EasyDict(type="class", version=6, module_src=SOURCE, class_name=self.kind, state=dict(self.__dict__))
        meta["state"].pop("kind", None)
        return _reconstruct, (meta,), None


@contextlib.contextmanager
def stand_ins():
    """While this lasts, the names that official files ask for lead to the classes of this file."""
    homes = {"torch_utils.persistence": _reconstruct, "dnnlib.util": EasyDict}
    _reconstruct.__name__ = _reconstruct.__qualname__ = "_reconstruct_persistent_obj"
    before = {}
    for home, thing in homes.items():
        thing.__module__ = home
        for name in (home.partition(".")[0], home):
            before.setdefault(name, sys.modules.get(name))
            sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[home], thing.__name__, thing)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.__setitem__(name, module)


def tree(state, kind, init):
    """A tree of `Persistent` modules that holds a state dict, with ModuleDicts where official networks have them."""
    root = Persistent()
    root.kind = kind
    for key, value in state.items():
        *path, leaf = key.split(".")
        module = root
        for i, part in enumerate(path):
            if part not in module._modules:
                child = nn.ModuleDict() if i == 1 and part in ("enc", "dec") else Persistent()
                module._modules[part] = child
            module = module._modules[part]
        buffer = leaf in ("resample_filter", "freqs", "u")
        if buffer:
            module._buffers[leaf] = value.clone()
        else:
            module._parameters[leaf] = nn.Parameter(value.clone())
    root.__dict__["_init_args"] = ()
    root.__dict__["_init_kwargs"] = EasyDict(init)
    root.__dict__["skip_scale"] = np.sqrt(0.5)
    root._modules["model"]._parameters["nothing"] = None
    return root


def content(state, kind="EDMPrecond", init=None):
    """What an official file holds, ready to be pickled."""
    return {
        "ema": tree(state, kind, init or TINY),
        "loss_fn": None,
        "augment_pipe": None,
        "dataset_kwargs": EasyDict(path="data.zip", use_labels=True, hooks=collections.OrderedDict(a=1)),
    }


def dump(what, protocol=4):
    with stand_ins():
        return pickle.dumps(what, protocol=protocol)


def tiny_pickle(kind="EDMPrecond", init=None, **changes):
    """A small checkpoint as bytes; `changes` maps official tensor names to other tensors, None leaves one out."""
    state = tiny_state(kind, init)
    for name, value in changes.items():
        state[name] = value
    return dump(content({k: v for k, v in state.items() if v is not None}, kind, init))


def storage_bytes(tensor, **options):
    """The old-style torch file of a tensor's storage, as pickled tensors hold it."""
    buffer = io.BytesIO()
    torch.save(tensor.storage(), buffer, _use_new_zipfile_serialization=False, **options)
    return buffer.getvalue()
