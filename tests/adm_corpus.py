"""Hostile files in the shape of guided-diffusion checkpoints: zip archives, pickles, tensors and names gone wrong."""

from __future__ import annotations

import collections
import functools
import io
import pickle
import struct
import warnings
import zipfile

import torch

import adm_files
from edm_corpus import executing, named, text

ROOT = "archive"
KEY = "middle_block.2.out_layers.3.bias"


def saved(what, **options):
    buffer = io.BytesIO()
    torch.save(what, buffer, **options)
    return buffer.getvalue()


@functools.cache
def small():
    """A checkpoint as bytes."""
    return saved(adm_files.state())


@functools.cache
def entries(raw):
    """Name → content of a file that torch.save wrote."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def archive(content, compression=zipfile.ZIP_STORED):
    """The zip archive of names and contents, in a list so that a name may come twice."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file, warnings.catch_warnings(action="ignore"):
        for name, value in content:
            file.writestr(zipfile.ZipInfo(name), value, compression)
    return buffer.getvalue()


def with_pickle(raw):
    """A checkpoint whose pickle is another one."""
    return archive([*(entries(small()) | {f"{ROOT}/data.pkl": raw}).items()])


def with_state(**changes):
    """A checkpoint with other tensors under some names; None leaves one out."""
    return saved({k: v for k, v in (adm_files.state() | changes).items() if v is not None})


def _wrap(fragment):
    """The pickle of a checkpoint that holds a piece of pickle beside its tensors."""
    good = entries(small())[f"{ROOT}/data.pkl"]
    assert good.endswith(b"u.")
    return good[:-2] + text("more") + fragment + b"u."


def _about(fragment):
    """The pickle of an OrderedDict of no tensors, with an attribute that nobody reads."""
    return b"\x80\x02" + named("collections", "OrderedDict") + b")R}" + text("_metadata") + fragment + b"sb."


def _pickles(canary):
    known = named("collections", "OrderedDict") + b")R"
    storage = text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu")
    lone = {
        "bytearray of 2**40": named("builtins", "bytearray") + b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R",
        "bytearray": named("__builtin__", "bytearray") + b"J\xff\xff\xff\x7f\x85R",
        "counter": named("collections", "Counter") + b")R",
        "dtype": named("torch", "float32"),
        "size": named("torch", "Size") + b")R",
        "sparse": named("torch._utils", "_rebuild_sparse_tensor") + b")R",
        "meta": named("torch._utils", "_rebuild_meta_tensor_no_storage") + b")R",
        "device": named("torch", "device") + text("cuda") + b"\x85R",
        "encode": named("_codecs", "encode") + text("a") + text("latin1") + b"\x86R",
        "call of torch": named("torch", "load") + text("/etc/passwd") + b"\x85R",
        "a number": b"K\x01",
        "a list": b"]",
        "none": b"N",
        "a dict": b"}",
        "an OrderedDict": known,
        "a lone storage": b"(" + storage + b"K\x02tQ",
        "a deep tuple": b")" + b"\x85" * 10_000,
        "memo index": b"r\xff\xff\xff\xff",
        "text claim": b"X\xff\xff\xff\xff",
        "number of 255 bytes": b"\x8a\xff" + b"\x01" * 255,
        "ext1": b"\x82\x01",
        "buffer": b"\x97",
    }
    fragments = lone | executing(canary)
    found = {f"beside the tensors: {name}": with_pickle(_wrap(f)) for name, f in fragments.items()}
    found |= {f"as the checkpoint: {name}": with_pickle(b"\x80\x02" + f + b".") for name, f in fragments.items()}
    found |= {f"as an attribute: {name}": with_pickle(_about(f)) for name, f in executing(canary).items()}
    hidden = entries(small())[f"{ROOT}/data.pkl"]
    ordered = entries(saved(collections.OrderedDict(adm_files.state())))[f"{ROOT}/data.pkl"]
    found["an attribute named items"] = with_pickle(ordered[:-1] + b"}" + text("items") + b"K\x01sb.")
    found["attributes that are no dict"] = with_pickle(ordered[:-1] + b"K\x01b.")
    found["bytes after the pickle"] = with_pickle(hidden + b"\0")
    found["two values"] = with_pickle(hidden[:-1] + b"N.")
    found["no pickle"] = with_pickle(b"")
    found["protocol 1"] = with_pickle(b"\x80\x01" + hidden[2:])
    found["a name in protocol 0"] = with_pickle(pickle.dumps(print, 0))
    return found


def _references():
    """Tensors that refer to storages in ways that no checkpoint does."""
    tensor, ordered = named("torch._utils", "_rebuild_tensor_v2"), named("collections", "OrderedDict") + b")R"

    def of(
        kind="FloatStorage", key="0", count=b"K\x02", offset=b"K\x00", size=b"K\x02\x85", step=b"K\x01\x85", rest=None
    ):
        reference = b"(" + text("storage") + named("torch", kind) + text(key) + text("cpu") + count + b"tQ"
        rest = b"\x89" + ordered if rest is None else rest
        return b"\x80\x02}" + text("a") + tensor + b"(" + reference + offset + size + step + rest + b"tRs."

    huge, low = b"\x8a\x06" + (2**40).to_bytes(6, "little"), b"J\xff\xff\xff\xff"
    variants = {
        "missing storage": of(key="7"),
        "a storage outside": of(key="../data.pkl"),
        "more values than there are": of(count=b"K\x03", size=b"K\x03\x85"),
        "fewer values than there are": of(count=b"K\x01", size=b"K\x01\x85"),
        "no values": of(count=b"K\x00", size=b"K\x00\x85"),
        "huge count": of(count=huge),
        "offset": of(offset=b"K\x01"),
        "offset, huge": of(offset=huge),
        "offset, negative": of(offset=low),
        "shape, huge": of(size=huge + b"\x85", step=b"K\x00\x85"),
        "shape, negative": of(size=low + b"\x85"),
        "shape, text": of(size=text("2") + b"\x85"),
        "shape, true": of(size=b"\x88\x85"),
        "shape, zero": of(size=b"K\x00\x85"),
        "shape, list": of(size=b"]"),
        "stride": of(step=b"K\x02\x85"),
        "stride, negative": of(step=low + b"\x85"),
        "stride, short": of(step=b")"),
        "nine axes": of(size=b"(" + b"K\x01" * 9 + b"t", step=b"(" + b"K\x01" * 9 + b"t"),
        "double": of(kind="DoubleStorage", count=b"K\x01", size=b"K\x01\x85"),
        "long": of(kind="LongStorage", count=b"K\x01", size=b"K\x01\x85"),
        "another kind": of(kind="UntypedStorage"),
        "hooks": of(rest=b"\x89" + ordered + text("a") + b"K\x01s"),
        "hooks are none": of(rest=b"\x89N"),
        "grad is a number": of(rest=b"K\x01" + ordered),
        "metadata": of(rest=b"\x89" + ordered + b"}"),
        "few arguments": of(rest=b""),
    }
    values = struct.pack("<2f", 1.0, 2.0)
    files = {name: [(f"{ROOT}/data.pkl", raw), (f"{ROOT}/data/0", values)] for name, raw in variants.items()}
    return {f"reference: {name}": archive(content) for name, content in files.items()}


def _tensors():
    weight = "input_blocks.1.0.in_layers.2.weight"
    good = adm_files.state()
    found = {
        "missing": with_state(**{KEY: None}),
        "extra": with_state(more=torch.ones(2)),
        "wrong shape": with_state(**{KEY: torch.ones(3)}),
        "another shape": with_state(**{weight: good[weight].transpose(0, 1)[:, :16].contiguous()}),
        "nan": with_state(**{KEY: torch.full((64,), float("nan"))}),
        "infinity": with_state(**{KEY: torch.full((64,), float("-inf"))}),
        "double": with_state(**{KEY: torch.ones(64, dtype=torch.float64)}),
        "integers": with_state(**{KEY: torch.ones(64, dtype=torch.int32)}),
        "complex": with_state(**{KEY: torch.ones(64, dtype=torch.complex64)}),
        "sparse": with_state(**{KEY: torch.ones(64).to_sparse()}),
        "empty": with_state(**{KEY: torch.ones(0)}),
        "0-d": with_state(**{KEY: torch.tensor(1.0)}),
        "all shared": saved({name: torch.ones(1).expand(value.shape) for name, value in good.items()}),
        "no time": with_state(**{"time_embed.0.weight": None}),
        "no input": with_state(**{"input_blocks.0.0.weight": None}),
        "no channels": with_state(**{"time_embed.0.weight": torch.ones(128, 1)}),
        "huge time": with_state(**{"time_embed.2.weight": torch.ones(1, 1).expand(2**30, 2**20)}),
        "many classes": with_state(**{"label_emb.weight": torch.ones(1, 1).expand(2**30, 128)}),
        "a classifier": saved({n: v for n, v in good.items() if not n.startswith("output_blocks")}),
        "an upsampler": saved(adm_files.state(channels=6, outputs=6)),
        "odd outputs": saved(adm_files.state(outputs=4)),
        "resampling by convolutions": with_state(**{"input_blocks.2.0.op.weight": torch.ones(32, 32, 3, 3)}),
        "another network": saved(torch.nn.Linear(2, 2).state_dict()),
        "one up block less": with_state(**{"output_blocks.1.2.in_layers.0.weight": None}),
        "300 output blocks": with_state(
            **{f"output_blocks.{i}.0.in_layers.0.weight": torch.ones(2) for i in range(300)}
        ),
        "30 channels": saved(adm_files.state(base=30)),
        "flat attention": with_state(**{"middle_block.1.qkv.weight": good["middle_block.1.qkv.weight"][:, :, 0]}),
    }
    return {f"tensors: {name}": raw for name, raw in found.items()}


def _bundles():
    good = adm_files.state()
    net = torch.nn.Linear(2, 3)
    return {
        "bundle": saved({"state_dict": good, "epoch": 3}),
        "bundle in order": saved({"model": net.state_dict()}),
        "optimizer": saved(torch.optim.Adam(net.parameters()).state_dict()),
        "module": saved(net),
        "list": saved([1, 2]),
        "tensor": saved(torch.ones(2)),
        "empty dict": saved({}),
        "numbers as names": saved({0: torch.ones(2)}),
        "long name": saved({"a" * 1000: torch.ones(2)}),
        "text": saved({"a": "b"}),
        "array": saved({"a": torch.ones(2).numpy()}),
        "old form": saved(good, _use_new_zipfile_serialization=False),
        "TorchScript": _script(),
    }


def _script():
    content = entries(small())
    return archive([*content.items(), (f"{ROOT}/constants.pkl", b"\x80\x02).")])


def _archives():
    good = small()
    content = entries(good)
    items = [*content.items()]
    end = len(good) - 22
    many = [(f"{ROOT}/more/{i}", b"") for i in range(17_000)]
    bomb = dict(items) | {f"{ROOT}/data/0": bytes(10**7)}
    found = {
        "empty file": b"",
        "two bytes": b"PK",
        "zeros": bytes(10_000),
        "text file": b"hello\n" * 100,
        "an empty archive": archive([]),
        "deflated": archive(items, zipfile.ZIP_DEFLATED),
        "deflated bomb": archive([*bomb.items()], zipfile.ZIP_DEFLATED),
        "bzip2": archive(items, zipfile.ZIP_BZIP2),
        "lzma": archive(items, zipfile.ZIP_LZMA),
        "many entries": archive(items + many),
        "trailing bytes": good + b"\0",
        "a comment": good[:-2] + b"\x05\x00hello",
        "leading bytes": b"hello" + good,
        "no directory": good[:end],
        "no end": good[:-1],
        "two folders": archive([*items, ("other/data/0", b"")]),
        "twice": archive([*items, items[0]]),
        "two pickles": archive([*items, (f"{ROOT}/data.pkl", b"\x80\x02}.")]),
        "no pickle": archive([item for item in items if not item[0].endswith("data.pkl")]),
        "a huge pickle": with_pickle(b"\x80\x02" + b"N0" * 2**23 + b"}."),
        "big-endian": archive([*(content | {f"{ROOT}/byteorder": b"big"}).items()]),
        "escape": archive([*items, ("../../escape", b"x")]),
        "encrypted": good.replace(b"PK\x01\x02\x00\x00\x00\x00\x08\x08", b"PK\x01\x02\x00\x00\x00\x00\x09\x08"),
        "far directory": good[:end] + _far(len(good) - 22, 2**40, 2**50, end) + good[end:],
        "far directory elsewhere": good[:end] + _far(3, 1, 100, end) + good[end:],
    }
    near = archive(items)  # without a far end
    for place, form, value in ((10, "<H", 60_000), (12, "<I", 2**31), (12, "<I", 1), (16, "<I", 2**31), (16, "<I", 0)):
        for name, raw in (("torch", good), ("zipfile", near)):
            at = len(raw) - 22 + place
            changed = raw[:at] + struct.pack(form, value) + raw[at + struct.calcsize(form) :]
            found[f"the end of {name}, {value} at {place}"] = changed
    directory = good.index(b"PK\x01\x02")
    for place, name in ((20, "compressed"), (24, "plain"), (42, "place")):
        for value in (2**31, 2**32 - 2):
            raw = bytearray(good)
            raw[directory + place : directory + place + 4] = struct.pack("<I", value)
            found[f"an entry's {name} size of {value}"] = bytes(raw)
    return {f"archive: {name}": raw for name, raw in found.items()}


def _far(place, count, length, offset):
    """The end of a zip64 archive: what it announces, and where it says that stands."""
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, length, offset)
    return record + b"PK\x06\x07" + struct.pack("<IQI", 0, place, 1)


def corpus(canary):
    """Every hostile file, by name."""
    parts = (_pickles(canary), _references(), _tensors(), _bundles(), _archives())
    return {name: raw for part in parts for name, raw in part.items()}
