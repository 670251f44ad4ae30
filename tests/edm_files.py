"""Reference networks and test pickles of EDM checkpoints."""
from __future__ import annotations
import json
from pathlib import Path
import torch
from safetensors.torch import load_file
from fanal.nets import DhariwalUNetConfig, Preconditioned, SongUNetConfig
FIGURES = Path(__file__).parent / "figures" / "edm_networks"
INDEX = json.loads((FIGURES / "index.json").read_text())["networks"]
PRECONDITIONING = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}

def build(name):
    about = INDEX[name]; init = dict(about["init"])
    side, ch, classes = init.pop("img_resolution"), init.pop("img_channels"), init.pop("label_dim")
    kind = {"SongUNet": SongUNetConfig, "DhariwalUNet": DhariwalUNetConfig}[init.pop("model_type")]
    config = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in init.items()})
    return Preconditioned(config, (ch, side, side), classes=classes, preconditioning=PRECONDITIONING[about["class"]])

def reference(name):
    tensors = load_file(FIGURES / f"{name}.safetensors")
    model = build(name)
    state = {k.removeprefix("state.").replace("model.", "net.", 1): v for k, v in tensors.items() if k.startswith("state.")}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False), tensors
