"""From a foreign checkpoint to a model folder: `model.safetensors` and `model.json`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from fanal.adapters.edm import describe_edm, load_edm
from fanal.errors import FanalError
from fanal.nets import save_model

__all__ = ["convert", "sha256_of"]

_FILES = ("model.safetensors", "model.json")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits.

    Raises:
        FanalError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FanalError(f"cannot read {path}: {error.strerror or error}") from error


def convert(path: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, Any]:
    """Write the network of an official EDM pickle as a model folder; nothing in the pickle is run.

    The folder gives the same outputs bit for bit. It is made beside its place first, so that a failure leaves what
    was there.

    Args:
        path: the `.pkl` file.
        out: the folder to write.
        overwrite: replace a model folder that is there already.

    Returns:
        The card, with the file's name and SHA-256.

    Raises:
        FanalError: the file is no EDM checkpoint, `out` exists, or it cannot be written.
    """
    source, folder = Path(path), Path(out)
    _check_place(folder, overwrite)
    card, model = describe_edm(source), load_edm(source)
    card["source"]["sha256"] = sha256_of(source)
    part = folder.with_name(f".{folder.name}.part{os.getpid()}")
    try:
        save_model(part, model, card)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            (folder / "model.json").unlink()  # without it, a folder is not a whole model
        for name in _FILES:
            os.replace(part / name, folder / name)
    except OSError as error:
        raise FanalError(f"cannot write {folder}: {error.strerror or error}; try another place") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return card


def _check_place(folder: Path, overwrite: bool) -> None:
    """Refuse to write over anything but, when asked, a model folder."""
    if not folder.name or folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FanalError(f"{folder} is no place for a model folder: choose another")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / "model.json").is_file():
        raise FanalError(f"{folder} holds other files: choose another place")
    if not overwrite:
        raise FanalError(f"{folder} holds a model: choose another place, or pass --overwrite to replace it")
