"""Files that are either whole or not there: write to a temporary name, flush, rename."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fanal.errors import FanalError

__all__ = ["read_json", "write_atomically", "write_json", "write_tensors"]

_JSON_LIMIT = 16 * 1024 * 1024


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place.

    Raises:
        FanalError: the folder cannot be made or written, or the disk is full; nothing half-written stays.
    """
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise FanalError(f"cannot write {path}: {error.strerror or error}; try another --out or free some space") from (
            error
        )
    finally:
        part.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors, atomically.

    Raises:
        FanalError: the place cannot be written.
    """
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def write(part: Path) -> None:
        try:
            save_file(whole, str(part), dict(header or {}))
        except Exception as error:  # safetensors reports a full disk with its own exception
            raise OSError(str(error)) from error

    write_atomically(path, write)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted-as-given keys, atomically.

    Raises:
        FanalError: the place cannot be written.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"

    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Raises:
        FanalError: the file is missing, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise FanalError(f"{path} is larger than {_JSON_LIMIT} bytes, which no card or run of fanal is")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FanalError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise FanalError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
