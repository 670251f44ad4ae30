"""State dicts in files of `torch.save`: looked through before torch reads them, tensors only."""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from fanal.adapters.pickles import Call, Global, Persistent, Source, kind_of, read_pickle
from fanal.adapters.storages import PARAMETER, TENSOR
from fanal.errors import FanalError, reason

__all__ = ["TensorRecord", "read_state_dict", "read_tensor_records"]

_ORDERED = "collections.OrderedDict"
_DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16}
_OTHERS = ("DoubleStorage", "LongStorage", "IntStorage", "ShortStorage", "CharStorage", "ByteStorage", "BoolStorage")
_KNOWN = {_ORDERED: "items state"} | dict.fromkeys([PARAMETER, TENSOR], "")
_KNOWN |= dict.fromkeys([f"torch.{name}" for name in (*_DTYPES, *_OTHERS)], "")

_FILE_BYTES = 2**32
_PICKLE_BYTES = 2**23
_DIRECTORY_BYTES, _ENTRIES = 2**22, 2**14
_END, _FAR_END, _LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_SIZE, _FAR_END_SIZE, _LOCATOR_SIZE = 22, 56, 20
_FULL = (2**16 - 1, 2**32 - 1, 2**32 - 1)  # "see the far end" in the near one
_AXES, _LENGTH = 8, 2**31


@dataclass(frozen=True)
class TensorRecord:
    """What a file says about one of its tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def read_tensor_records(path: str | os.PathLike[str]) -> dict[str, TensorRecord]:
    """Return the name, shape and dtype of each tensor of a state dict that `torch.save` wrote; no tensor is read.

    The zip archive may hold stored entries only, of sizes that fit into the file. Its pickle is followed by a reader
    that runs nothing; a name that a state dict does not need ends the reading.

    Args:
        path: the file.

    Raises:
        FanalError: the file is missing, cut off, hostile, of the old form without a zip archive, or holds something
            else than tensors by name.
    """
    source = Path(path)
    try:
        return _records(source)
    except OSError as error:
        raise FanalError(f"cannot read {source}: {reason(error)}") from error
    except FanalError as error:
        raise FanalError(f"cannot read {source} as a state dict: {error}") from error


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a state dict that `torch.save` wrote, mapped from the file.

    After the checks of `read_tensor_records` the file is read by `torch.load` with `weights_only=True`.

    Args:
        path: the file; it must stay as it is while the tensors are used.

    Raises:
        FanalError: as `read_tensor_records`, or torch cannot read the file.
    """
    records = read_tensor_records(path)
    wanted = sum(math.prod(record.shape) * record.dtype.itemsize for record in records.values())
    if wanted > os.stat(path).st_size:
        raise FanalError(f"cannot read {path}: its tensors share memory, and take {wanted} bytes apart")
    try:
        state = torch.load(os.fspath(path), map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch tells damage by exceptions of many kinds
        reason = (str(error).splitlines() or [""])[0]
        raise FanalError(f"cannot read {path}: torch.load fails with {type(error).__name__}: {reason:.200}") from error
    found = {name: TensorRecord(tuple(value.shape), value.dtype) for name, value in state.items()}
    if found != records:
        raise FanalError(f"cannot read {path}: torch finds other tensors in it than its pickle describes")
    return dict(state)


def _records(path: Path) -> dict[str, TensorRecord]:
    size = path.stat().st_size
    if not path.is_file() or size > _FILE_BYTES:
        raise FanalError(f"no file, or one of more than {_FILE_BYTES} bytes")
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise FanalError(
                "the file is no zip archive, which torch.save has written since torch 1.6; if you trust it, write it "
                "again with torch.save(torch.load(FILE, map_location='cpu', weights_only=True), NEW_FILE)"
            )
        _check_directory(file, size)
        try:
            with zipfile.ZipFile(file) as archive:
                entries = _entries(archive, size)
                raw = archive.read(entries["data.pkl"])
        except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, struct.error) as error:
            if isinstance(error, FanalError):
                raise
            raise FanalError(f"the zip archive is damaged or cut off ({error})") from error
    pickle = Source(io.BytesIO(raw), 0, len(raw))
    root = read_pickle(pickle, _KNOWN, persistent=True)
    if pickle.position != len(raw):
        raise FanalError("bytes follow the end of the pickle")
    sizes = {name: info.file_size for name, info in entries.items()}
    return {name: _record(value, name, sizes) for name, value in _items(root).items()}


def _check_directory(file: BinaryIO, size: int) -> None:
    """Refuse a zip directory that is larger than that of any checkpoint, before it is read."""
    file.seek(max(0, size - _END_SIZE - _LOCATOR_SIZE))
    tail = file.read()
    end = tail[-_END_SIZE:]
    if len(tail) < _END_SIZE + _LOCATOR_SIZE or not end.startswith(_END):
        raise FanalError("the file is cut off: it does not end with the directory of a zip archive")
    count, length, start = struct.unpack("<HII", end[10:20])
    place = size - _END_SIZE
    if tail.startswith(_LOCATOR):
        place -= _LOCATOR_SIZE + _FAR_END_SIZE
        file.seek(max(0, place))
        record = file.read(_FAR_END_SIZE)
        if struct.unpack("<Q", tail[8:16])[0] != place or not record.startswith(_FAR_END):
            raise FanalError("the directory of the zip archive is not where torch.save puts it")
        near, (count, length, start) = (count, length, start), struct.unpack("<QQQ", record[32:56])
        if any(own not in (far, full) for own, far, full in zip(near, (count, length, start), _FULL, strict=True)):
            raise FanalError("the zip archive describes its directory in two ways")
    if start + length != place:
        raise FanalError("the directory of the zip archive is not where torch.save puts it")
    if count > _ENTRIES or length > _DIRECTORY_BYTES:
        raise FanalError(f"the zip archive announces {count} entries, described in {length} bytes: no state dict does")
    file.seek(0)


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries by their name below the archive's one folder; only stored ones that fit into the file."""
    found: dict[str, zipfile.ZipInfo] = {}
    roots: set[str] = set()
    for info in archive.infolist():
        root, _, name = info.filename.partition("/")
        roots.add(root)
        stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        if not stored or info.flag_bits & 0x1 or not 0 <= info.header_offset < size:
            raise FanalError(
                f"the entry {info.filename[:80]!r} is compressed or encrypted, which torch.save never does"
            )
        if name in found:
            raise FanalError(f"the entry {info.filename[:80]!r} is there twice")
        found[name] = info
    if sum(info.file_size for info in found.values()) > size:
        raise FanalError("the zip archive announces more bytes than the file has")
    if "constants.pkl" in found:
        raise FanalError("the file is a TorchScript program, no state dict")
    if len(roots) != 1 or "data.pkl" not in found:
        raise FanalError("the zip archive has no data.pkl: it was not written by torch.save")
    if found["data.pkl"].file_size > _PICKLE_BYTES:
        raise FanalError(f"the pickle in the archive has more than {_PICKLE_BYTES} bytes")
    if "byteorder" in found:
        with archive.open(found["byteorder"]) as file:
            if file.read(10) != b"little":
                raise FanalError("the file was written on a big-endian machine")
    return found


def _items(root: object) -> Mapping[str, object]:
    """The entries of the state dict."""
    if isinstance(root, Call) and root.name == _ORDERED and not root.args:
        about = {} if root.state is None else root.state
        if type(about) is not dict or about.keys() - {"_metadata"}:  # an attribute could hide a method of the dict
            raise FanalError("the state dict carries more than tensors")
        root = dict(root.items)
    if type(root) is not dict or not root:
        raise FanalError(f"it should hold tensors by name, it holds {kind_of(root)}")
    for name, value in root.items():
        if type(name) is not str or len(name) > 256:
            raise FanalError(f"each tensor should have a short name, got {kind_of(name)}")
        if type(value) is dict or isinstance(value, Call) and value.name == _ORDERED:
            raise FanalError(
                f"{name[:80]!r} is a dict, so this is a training checkpoint or a bundle: save the network's state dict "
                "alone, with torch.save"
            )
    return cast(Mapping[str, object], root)


def _record(value: object, name: str, sizes: Mapping[str, int]) -> TensorRecord:
    """What the file says about a tensor; it lies within its storage, and the storage within the file."""
    where = f"{name[:80]!r}"
    if isinstance(value, Call) and value.name == PARAMETER and value.args:
        value = value.args[0]
    if not isinstance(value, Call) or value.name != TENSOR or not 6 <= len(value.args) <= 7:
        raise FanalError(f"{where} should be a tensor, got {kind_of(value)}")
    storage, offset, shape, stride, grad, hooks = value.args[:6]
    plain = isinstance(hooks, Call) and hooks.name == _ORDERED and not (hooks.args or hooks.items or hooks.state)
    if type(grad) is not bool or not plain or value.args[6:] not in ((), (None,)):
        raise FanalError(f"{where} carries more than values")
    dtype, count = _storage(storage, where, sizes)
    if not _whole(shape) or not _whole(stride) or type(offset) is not int or not 0 <= offset < count:
        raise FanalError(f"{where} should have a shape, strides and an offset, got {kind_of(shape)}, {kind_of(stride)}")
    lengths, steps = cast(tuple[int, ...], shape), cast(tuple[int, ...], stride)
    if len(lengths) != len(steps) or 0 in lengths:
        raise FanalError(f"{where} should have a shape, strides and values, got {lengths} and {steps}")
    if offset + sum((n - 1) * step for n, step in zip(lengths, steps, strict=True)) >= count:
        raise FanalError(f"{where} reaches beyond its storage of {count} values")
    return TensorRecord(lengths, dtype)


def _whole(value: object) -> bool:
    return type(value) is tuple and len(value) <= _AXES and all(type(n) is int and 0 <= n < _LENGTH for n in value)


def _storage(storage: object, where: str, sizes: Mapping[str, int]) -> tuple[torch.dtype, int]:
    """The dtype and the number of values of a storage that the archive holds whole."""
    parts = storage.key if isinstance(storage, Persistent) else None
    if not isinstance(parts, tuple) or len(parts) != 5 or not isinstance(parts[1], Global):
        raise FanalError(f"{where} should refer to a storage, got {kind_of(storage)}")
    word, kind, key, _, count = parts
    name = kind.name.removeprefix("torch.")
    if name not in _DTYPES:
        raise FanalError(f"{where} should hold float32, float16 or bfloat16, got {name.removesuffix('Storage')}")
    if type(word) is not str or word != "storage" or type(key) is not str or type(count) is not int or count < 1:
        raise FanalError(f"{where} should refer to a storage by a key and a size")
    dtype = _DTYPES[name]
    if sizes.get(f"data/{key}") != count * dtype.itemsize:
        raise FanalError(f"{where} wants {count} values of {dtype.itemsize} bytes, which the archive does not hold")
    return dtype, count
