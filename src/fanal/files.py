"""Files that are either whole or not there: write to a temporary name, flush, rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fanal.errors import FanalError, reason

__all__ = ["check_folder", "read_json", "read_tensors", "sha256_of", "write_atomically", "write_json", "write_tensors"]

_UMASK = os.umask(0o022)  # the only way to read it is to set it
os.umask(_UMASK)
_JSON_LIMIT = 16 * 1024 * 1024


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place.

    Raises:
        FanalError: the folder cannot be made or written, or the disk is full; nothing half-written stays.
    """
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.chmod(part, 0o666 & ~_UMASK)  # safetensors writes for the owner alone
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise FanalError(f"cannot write {path}: {reason(error)}; try another --out or free some space") from (error)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def check_folder(folder: Path, what: str, replaceable: Callable[[Path], bool], overwrite: bool) -> None:
    """Refuse to write a folder where something is, but for an empty one and, when asked, one that may be replaced.

    Args:
        folder: where it shall be.
        what: what it holds, with its article, as in "a model".
        replaceable: whether a folder that is there already is of that kind.
        overwrite: replace such a folder.

    Raises:
        FanalError: the place cannot be taken; the message says why.
    """
    if not folder.name or folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FanalError(f"{folder} is no place for the folder of {what}: choose another")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not replaceable(folder):
        raise FanalError(f"{folder} holds other files: choose another place")
    if not overwrite:
        raise FanalError(f"{folder} holds {what}: choose another place, or pass --overwrite to replace it")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits.

    Raises:
        FanalError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FanalError(f"cannot read {path}: {reason(error)}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors, atomically.

    Raises:
        FanalError: the place cannot be written.
    """
    whole: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in tensors.items():
        own = value.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        whole[name] = own.clone() if place in places else own  # the format refuses tensors that share memory
        places.add(place)

    def write(part: Path) -> None:
        try:
            save_file(whole, str(part), dict(header or {}))
        except Exception as error:  # safetensors reports a full disk with its own exception
            raise OSError(str(error)) from error

    write_atomically(path, write)


def read_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata, checking names and shapes before any tensor is made.

    Args:
        path: the file.
        shapes: the names and shapes it must have; None takes what there is.

    Raises:
        FanalError: the file is missing, truncated or not safetensors, or a name or shape differs.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            if shapes is not None and found != shapes:
                wrong = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
                raise FanalError(
                    f"{path} does not fit its network in {len(wrong)} tensors; the first, {wrong[0]!r:.80}, should "
                    f"have shape {shapes.get(wrong[0], 'none')}, the file has {found.get(wrong[0], 'none')}"
                )
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except FileNotFoundError as error:
        raise FanalError(f"cannot read {path}: there is no such file") from error
    except (SafetensorError, OSError, RuntimeError) as error:
        raise FanalError(f"cannot read {path}: not a whole safetensors file ({error})") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted-as-given keys, atomically.

    Raises:
        FanalError: the place cannot be written.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Raises:
        FanalError: the file is missing, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise FanalError(f"{path} is larger than {_JSON_LIMIT} bytes, which no card or run of fanal is")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FanalError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FanalError(f"cannot read {path}: {reason(error)}") from error
    if not isinstance(value, dict):
        raise FanalError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
