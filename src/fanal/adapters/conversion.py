"""From a foreign checkpoint to a model folder: `model.safetensors` and `model.json`."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from fanal.adapters.adm import ADM_KINDS, adm_file, describe_adm, load_adm
from fanal.adapters.edm import describe_edm, load_edm
from fanal.errors import FanalError, reason
from fanal.files import check_folder, sha256_of
from fanal.nets import Preconditioned, save_model

__all__ = ["CHECKPOINTS", "checkpoint_file", "convert", "describe_checkpoint", "load_checkpoint"]

CHECKPOINTS = ("edm", *ADM_KINDS)
"""Kinds of foreign checkpoints, as their specs begin."""

_FILES = ("model.safetensors", "model.json")


def load_checkpoint(spec: str) -> Preconditioned:
    """Load `edm:FILE.pkl`, `adm:FILE.pt` or `consistency:FILE.pt`, by `load_edm` or `load_adm`.

    Raises:
        FanalError: the file is no such checkpoint.
    """
    return load_edm(checkpoint_file(spec)) if spec.startswith("edm:") else load_adm(spec)


def describe_checkpoint(spec: str) -> dict[str, Any]:
    """Return the card of a foreign checkpoint, without reading its weights.

    Raises:
        FanalError: the file is no such checkpoint.
    """
    return describe_edm(checkpoint_file(spec)) if spec.startswith("edm:") else describe_adm(spec)


def checkpoint_file(spec: str) -> Path:
    """Return the file that the spec of a foreign checkpoint names.

    Raises:
        FanalError: the spec is of no such kind, or its settings make no sense.
    """
    kind, _, rest = spec.partition(":")
    if kind not in CHECKPOINTS or not rest:
        raise FanalError(f"expected edm:FILE.pkl, adm:FILE.pt or consistency:FILE.pt, got {spec!r}")
    return Path(rest) if kind == "edm" else adm_file(spec)


def convert(spec: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, Any]:
    """Write the network of a foreign checkpoint as a model folder; nothing in the checkpoint is run.

    The folder gives the same outputs bit for bit. It is made beside its place first, so that a failure leaves what
    was there.

    Args:
        spec: `edm:FILE.pkl`, `adm:FILE.pt` or `consistency:FILE.pt`; a file alone is an EDM pickle.
        out: the folder to write.
        overwrite: replace a model folder that is there already.

    Returns:
        The card, with the file's name and SHA-256.

    Raises:
        FanalError: the file is no such checkpoint, `out` exists, or it cannot be written.
    """
    text, folder = os.fspath(spec), Path(out)
    if text.partition(":")[0] not in CHECKPOINTS:
        if text.endswith((".pt", ".pth")):
            raise FanalError(f"{text} may be of several kinds: write adm:{text} or consistency:{text}")
        text = f"edm:{text}"
    check_folder(folder, "a model", lambda place: (place / "model.json").is_file(), overwrite)
    card, model = describe_checkpoint(text), load_checkpoint(text)
    card["source"]["sha256"] = sha256_of(checkpoint_file(text))
    part = folder.with_name(f".{folder.name}.part{os.getpid()}")
    try:
        save_model(part, model, card)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            (folder / "model.json").unlink()  # without it, a folder is not a whole model
        for name in _FILES:
            os.replace(part / name, folder / name)
    except OSError as error:
        raise FanalError(f"cannot write {folder}: {reason(error)}; try another place") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return card
