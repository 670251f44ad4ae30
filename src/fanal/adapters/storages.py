"""Tensors of an old-style torch file inside a pickle, read without torch's own loader."""

from __future__ import annotations

import io
import itertools
import math
from typing import BinaryIO, cast

import torch
from torch import Tensor

from fanal.adapters.pickles import Blob, Call, Global, Persistent, Source, kind_of, read_pickle
from fanal.errors import FanalError

__all__ = ["TENSOR_NAMES", "read_tensor"]

PARAMETER, TENSOR = "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"
STORAGE = "torch.storage._load_from_bytes"
TENSOR_NAMES = (PARAMETER, TENSOR, STORAGE)
"""The names that a pickled tensor asks for."""

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_KINDS = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_STORAGES = {f"torch.{kind}Storage": "" for kind in _KINDS}
_ITEM = 4  # bytes of a float32
_HEADER = 2**14


def read_tensor(record: object, file: BinaryIO, shape: tuple[int, ...]) -> Tensor:
    """Read one float32 tensor that a pickle holds as `torch._utils._rebuild_tensor_v2(...)`, or as a parameter of it.

    Args:
        record: what `read_pickle` returned for it.
        file: the file that the pickle was read from.
        shape: what the tensor must be; nothing larger is ever allocated.

    Raises:
        FanalError: the record is no tensor, or one of another shape, dtype or layout, or holds NaN or infinity, or
            its bytes are not those of an old-style torch file.
    """
    if isinstance(record, Call) and record.name == PARAMETER and record.args:
        record = record.args[0]
    if not isinstance(record, Call) or record.name != TENSOR or not 6 <= len(record.args) <= 7:
        raise FanalError(f"expected a tensor, got {kind_of(record)}")
    storage, offset, size, stride = record.args[:4]
    if not _whole(size) or size != shape:
        told = size if _whole(size) else kind_of(size)
        raise FanalError(f"expected shape {shape}, got {told}")
    if not _whole(stride) or not _dense(shape, cast(tuple[int, ...], stride)) or type(offset) is not int or offset:
        raise FanalError("the tensor is a view of a larger one, which no such checkpoint holds")
    if not isinstance(storage, Call) or storage.name != STORAGE or len(storage.args) != 1:
        raise FanalError(f"expected the bytes of a tensor, got {kind_of(storage)}")
    values = _values(storage.args[0], file, math.prod(shape))
    tensor = values.as_strided(shape, cast(tuple[int, ...], stride)).contiguous()
    if not bool(torch.isfinite(tensor).all()):
        raise FanalError("the tensor holds NaN or infinity: the training diverged or the file is damaged")
    return tensor


def _whole(value: object) -> bool:
    """Whether a value is a short tuple of sizes."""
    return type(value) is tuple and len(value) <= 8 and all(type(n) is int and 0 <= n < 2**40 for n in value)


def _dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the strides visit each value once, without gaps, in whatever order of axes."""
    if len(stride) != len(shape):
        return False
    axes = sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1)
    expected = itertools.accumulate((size for _, size in axes), lambda a, b: a * b, initial=1)
    return all(step == want for (step, _), want in zip(axes, expected, strict=False))


def _values(blob: object, file: BinaryIO, count: int) -> Tensor:
    """Read the float32 values of an old-style torch file: four small pickles, a count, and the values."""
    if not isinstance(blob, Blob):
        raise FanalError(f"expected the bytes of a tensor, got {kind_of(blob)}")
    if not 0 <= blob.size - _ITEM * count <= _HEADER:
        raise FanalError(f"{count} float32 values are expected, in {blob.size} bytes")
    file.seek(blob.start)
    head = file.read(blob.size - _ITEM * count)
    if head[:2] == b"PK":
        raise FanalError("the bytes of the tensor are a zip archive, which no such checkpoint holds")
    source = Source(io.BytesIO(head), 0, len(head))
    if read_pickle(source, {}) != _MAGIC or read_pickle(source, {}) != _VERSION:
        raise FanalError("the bytes of the tensor are no torch file")
    about = read_pickle(source, {})
    if not isinstance(about, dict) or about.get("little_endian") is not True:
        raise FanalError("the bytes of the tensor are no torch file of a little-endian machine")
    key = _storage_key(read_pickle(source, _STORAGES, persistent=True), count)
    keys = read_pickle(source, {})
    if not isinstance(keys, list) or len(keys) != 1 or type(keys[0]) is not str or keys[0] != key:
        raise FanalError("the torch file of a tensor must hold one storage")
    if source.number("<Q") != count or source.position != source.end:
        raise FanalError("the torch file of a tensor announces another size than it has")
    if not count:
        return torch.empty(0)
    raw = bytearray(_ITEM * count)
    if cast(io.BufferedReader, file).readinto(raw) != len(raw):
        raise FanalError("the file is cut off within a tensor")
    return torch.frombuffer(raw, dtype=torch.float32)


def _storage_key(reference: object, count: int) -> str:
    """The key of a reference `("storage", kind, key, location, count, None)` to float32 values."""
    parts = reference.key if isinstance(reference, Persistent) else None
    if not isinstance(parts, tuple) or len(parts) != 6 or not isinstance(parts[1], Global):
        raise FanalError("the torch file of a tensor holds something else than one storage")
    word, kind, key, _, size, view = parts
    if kind.name != "torch.FloatStorage":
        raise FanalError(f"expected float32 values (torch.FloatStorage), got {kind.name}")
    if type(word) is not str or word != "storage" or type(key) is not str or view is not None:
        raise FanalError("the torch file of a tensor holds something else than one storage")
    if type(size) is not int or size != count:
        raise FanalError(f"expected a storage of {count} values, got {kind_of(size)}")
    return key
