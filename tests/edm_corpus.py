"""Hostile files in the shape of EDM checkpoints; most of them would run code, or exhaust memory, when unpickled."""

from __future__ import annotations

import io
import struct
import zipfile

import torch

from edm_files import SOURCE, TINY, EasyDict, content, dump, storage_bytes, tiny_pickle, tiny_state

FREQS = "model.map_noise.freqs"


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def stacked(module, name):
    return text(module) + text(name) + b"\x93"


def wrap(fragment):
    """A good checkpoint with a piece of pickle in a place that nobody reads."""
    good = dump(content(tiny_state())["ema"])[2:-1]
    return b"\x80\x04}(" + text("ema") + good + text("dataset_kwargs") + fragment + b"u."


class Raw:
    """A pickled call of a function with arguments."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def with_freqs(blob, size=(2,), stride=(1,), offset=0):
    """A checkpoint in which the bytes, the shape or the strides of one tensor are others."""
    what = content(tiny_state())
    storage = Raw(torch.storage._load_from_bytes, blob)
    fake = Raw(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, EasyDict())
    what["ema"]._modules["model"]._modules["map_noise"]._buffers["freqs"] = fake
    return dump(what)


def with_argument(name, value):
    what = content(tiny_state())
    what["ema"]._init_kwargs[name] = value
    return dump(what)


def laughs(depth):
    """Lists of ten times the list before: ten to the power of `depth` values in a few bytes."""
    parts = [b"]"]
    for i in range(depth):
        parts.append(
            b"r" + struct.pack("<I", 2 * 10**5 - i) + b"](" + 10 * (b"j" + struct.pack("<I", 2 * 10**5 - i)) + b"e"
        )
    # each new list stays above the one before: a tuple takes all of them
    return b"(" + b"".join(parts) + b"t"


def executing(canary):
    """Fragments that make a file with Python's own unpickler."""
    code = text(f"open({str(canary)!r}, 'w').close()")
    shell = text(f"touch {canary}")
    return {
        "exec in reduce": named("builtins", "exec") + code + b"\x85R",
        "eval on the stack": stacked("builtins", "eval") + code + b"\x85R",
        "os.system": named("os", "system") + shell + b"\x85R",
        "posix.system": stacked("posix", "system") + shell + b"\x85R",
        "inst": b"(" + shell + b"ios\nsystem\n",
        "obj": b"(" + named("os", "system") + shell + b"o",
        "dotted": stacked("os", "path.os.system") + shell + b"\x85R",
        "torch.load": stacked("torch", "storage.torch.os.system") + shell + b"\x85R",
    }


def _structure(canary):
    """Opcodes and names that a checkpoint does not need."""
    known = named("collections", "OrderedDict") + b")R"
    lone = {
        "getattr": named("builtins", "getattr") + text("a") + text("b") + b"\x86R",
        "dotted name of a known module": stacked("torch", "storage._load_from_bytes"),
        "attribute of a known name": stacked("torch_utils.persistence", "_reconstruct_persistent_obj.__globals__"),
        "partial": named("functools", "partial") + b")R",
        "a name of numbers": b"K\x01K\x02\x93",
        "a very long name": b"c" + b"a" * 10**6 + b"\nb\n",
        "newobj": named("os", "system") + b")\x81",
        "newobj of no name": b"K\x01)\x81",
        "newobj with keywords": known + b")}\x92",
        "call of a call": known + b")R",
        "call with a list": named("collections", "OrderedDict") + b"]R",
        "state with __setstate__": known + b"}" + text("__setstate__") + named("collections", "OrderedDict") + b"sb",
        "state of a dict": b"}}b",
        "state of a list": b"]}b",
        "state twice": named("numpy", "dtype") + b")R)b)b",
        "items of a module": named("torch.nn.modules.container", "ModuleDict") + b")\x81" + text("a") + b"Ns",
        "ext1": b"\x82\x01",
        "ext2": b"\x83\x01\x00",
        "ext4": b"\x84\x01\x00\x00\x00",
        "persistent id": text("storage") + b"Q",
        "persistent id, text": b"Pstorage\n",
        "bytearray": b"\x96" + struct.pack("<Q", 2**50),
        "buffer": b"\x97",
        "read-only buffer": b"\x98",
        "text number": b"I1\n",
        "text long": b"L" + b"9" * 10**6 + b"L\n",
        "text string": b"S'a'\n",
        "pop": b"K\x010N",
        "dup": b"K\x012",
        "pop mark": b"(1N",
        "list as a key": b"}]K\x01s",
        "float as a key": b"}G" + bytes(8) + b"K\x01s",
        "list in a set": b"\x8f(]\x90",
        "odd items": b"}(K\x01u",
        "append to a tuple": b")K\x01a",
        "no such memo": b"jxxxx",
        "a mark that is not there": b"ttttt",
        "bad text": b"\x8c\x02\xff\xff",
        "unknown opcode": b"\xff",
        "old protocol": b"\x80\x01",
        "new protocol": b"\x80\x06",
    }
    return {name: wrap(fragment) for name, fragment in (lone | executing(canary)).items()}


def _bombs():
    deep = 100_000
    huge = struct.pack("<Q", 2**60)
    fragments = {
        "deep tuples": b")" + b"\x85" * deep,
        "deep lists": b"]" * deep + b"a" * (deep - 1),
        "deep dicts": b"}" + (text("a") + b"}") * deep + b"s" * deep,
        "deep calls": named("collections", "OrderedDict") + b"q\xff)R" + b"\x85" * 300,
        "memo index": b"r\xff\xff\xff\xff",
        "memo fill": b"\x94" * (2**18 + 10),
        "stack fill": b"(" + b"]" * (2**18 + 10) + b"t",
        "mark fill": b"(" * (2**18 + 10),
        "bytes claim": b"B\xff\xff\xff\xff",
        "bytes claim, 8": b"\x8e" + huge,
        "text claim": b"X\xff\xff\xff\xff",
        "text claim, 8": b"\x8d" + huge,
        "frame claim": b"\x95" + huge,
        "number claim": b"\x8b\xff\xff\xff\x7f",
        "number of 255 bytes": b"\x8a\xff" + b"\x01" * 255,
        "much text": (b"X" + struct.pack("<I", 2**23) + b"a" * 2**23) * 5,
    }
    return {name: wrap(fragment) for name, fragment in fragments.items()}


def _zip(level):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * level)
        file.writestr("../../escape", b"x")
    return buffer.getvalue()


def _nested(canary):
    """The torch file of one tensor, in other forms."""
    good = storage_bytes(torch.ones(2))
    new = io.BytesIO()
    torch.save(torch.ones(2), new)
    reference, keys = good.index(b"\x80\x02(X"), good.index(b"\x80\x02]")
    info = good.index(b"\x80\x02}")
    run = executing(canary)
    files = {
        "zip": new.getvalue(),
        "zip bomb": _zip(10**7),
        "empty": b"",
        "zeros": bytes(len(good)),
        "text": b"hello" * 50,
        "too long": good + bytes(4),
        "far too long": good + bytes(2**16),
        "cut": good[:-3],
        "three values": storage_bytes(torch.ones(3)),
        "double": storage_bytes(torch.ones(1, dtype=torch.float64)),
        "integers": storage_bytes(torch.ones(2, dtype=torch.int32)),
        "nan": storage_bytes(torch.tensor([1.0, float("nan")])),
        "infinity": storage_bytes(torch.tensor([1.0, float("-inf")])),
        "other magic": b"\x80\x02K\x01." + good[15:],
        "other count": good[:-16] + struct.pack("<Q", 2**60) + good[-8:],
        "other claim": good.replace(b"K\x02N", b"J\xff\xff\xff\x7fN"),
        "view": good.replace(b"K\x02Nt", b"K\x02)t"),
        "other key": good[:keys] + b"\x80\x02]X\x01\x00\x00\x00xa." + good[-16:],
        "two keys": good[:keys] + b"\x80\x02](K\x01K\x02e." + good[-16:],
        "no reference": good[:reference] + b"\x80\x02N." + good[keys:],
        "big-endian": good.replace(b"\x88X", b"\x89X"),
        "a file in a file": good[:reference] + b"\x80\x02" + stacked("torch.storage", "_load_from_bytes") + b"." + good,
        "os.system in the first": b"\x80\x02" + run["os.system"] + b"." + good[15:],
        "os.system in the second": good[:15] + b"\x80\x02" + run["os.system"] + b"." + good[info:],
        "eval in the third": good[:info] + b"\x80\x02" + run["eval on the stack"] + b"." + good[reference:],
        "exec in the fourth": good[:reference] + b"\x80\x02" + run["exec in reduce"] + b"." + good[keys:],
        "exec in the fifth": good[:keys] + b"\x80\x02" + run["exec in reduce"] + b"." + good[-16:],
        "deep": good[:info] + b"\x80\x02)" + b"\x85" * 5000 + b"." + good[reference:],
    }
    return {f"torch file: {name}": with_freqs(file) for name, file in files.items()}


def _tensors():
    good = storage_bytes(torch.ones(2))
    shapes = {
        "huge": ((2**39,), (1,)),
        "more axes": ((1, 2), (2, 1)),
        "negative": ((-2,), (1,)),
        "text": (("2",), (1,)),
        "bool": ((True, 2), (1, 1)),
        "list": ([2], (1,)),
        "zero stride": ((2,), (0,)),
        "far stride": ((2,), (2**30,)),
        "negative stride": ((2,), (-1,)),
        "short stride": ((2,), ()),
    }
    found = {f"size: {name}": with_freqs(good, size, stride) for name, (size, stride) in shapes.items()}
    found["offset"] = with_freqs(good, offset=1)
    found["offset, huge"] = with_freqs(good, offset=2**62)
    found["bytes are text"] = with_freqs("text")
    found["bytes are a list"] = with_freqs([])
    name = "model.dec.4x4_aux_conv.weight"
    found["missing"] = tiny_pickle(**{name: None})
    found["wrong shape"] = tiny_pickle(**{name: torch.ones(1, 4, 3, 1)})
    found["wrong dtype"] = tiny_pickle(**{name: torch.ones(1, 4, 3, 3, dtype=torch.float64)})
    found["half"] = tiny_pickle(**{name: torch.ones(1, 4, 3, 3, dtype=torch.float16)})
    found["complex"] = tiny_pickle(**{FREQS: torch.ones(2, dtype=torch.complex64)})
    found["not finite"] = tiny_pickle(**{name: torch.full((1, 4, 3, 3), float("nan"))})
    found["extra"] = tiny_pickle(**{"model.more.weight": torch.ones(2)})
    found["extra at the top"] = tiny_pickle(u=torch.ones(1001))
    found["a view"] = tiny_pickle(**{FREQS: None})
    return found


def _descriptions():
    values = {
        "img_resolution": [0, -4, 2**40, 6.5, "4", None, [4], 2**16],
        "img_channels": [0, 2**16, 10**30],
        "label_dim": [3, 2**16, -1],
        "model_channels": [8, 6, 0, 2**40, "4", 1024],
        "channel_mult": [[64] * 8, [], 1, [1, 2, 4, 8, 16], "1", [1.5], [1] * 1000],
        "num_blocks": [2, 16, 10**9],
        "resample_filter": [[], [0, 0], [1], [float("nan"), 1], [float("inf"), 1]],
        "attn_resolutions": [[4], ["4"], 4],
        "model_type": ["DhariwalUNet", "os.system", None, 3, ["SongUNet"]],
        "embedding_type": ["zero", "positional", None, ["fourier"]],
        "encoder_type": ["skip" * 10**5],
        "sigma_data": [0, -1, float("nan"), "x", None],
        "sigma_max": [-1, None, "80", float("nan"), 10**400],
        "more": [1, EasyDict(a=1)],
        "dropout": [float("nan"), 2, "0"],
    }
    return {f"{name}={str(v)[:30]}": with_argument(name, v) for name, many in values.items() for v in many}


def _modules():
    found = {}
    root = content(tiny_state())["ema"]
    root._modules["model"]._modules["again"] = root
    found["a module in itself"] = dump({"ema": root})
    shared = content(tiny_state())
    child = torch.nn.ModuleDict()
    for _ in range(40):
        parent = torch.nn.ModuleDict()
        parent._modules["a"] = parent._modules["b"] = child
        child = parent
    shared["ema"]._modules["model"]._modules["laughs"] = child
    found["modules shared to the power of forty"] = dump(shared)
    for key, value in (("_modules", 3), ("_parameters", [1]), ("_buffers", {"a": 1}), ("_init_kwargs", None)):
        root = content(tiny_state())["ema"]
        root.__dict__[key] = value
        found[f"{key} = {value}"] = dump({"ema": root})
    root = content(tiny_state())["ema"]
    root.kind = "Popen"
    found["another class"] = dump({"ema": root})
    for value in (None, 3, {}, [], {"type": "class"}, torch.ones(2)):
        found[f"ema = {type(value).__name__} {value!s:.5}"] = dump({"ema": value})
    found["two of the same argument"] = dump(_positional((4,), {**TINY}))
    found["too many arguments"] = dump(_positional((4,) * 50, {}))
    found["arguments are text"] = dump(_positional("4444", {}))
    return found


def _positional(args, words):
    what = content(tiny_state())
    what["ema"].__dict__.update(_init_args=args, _init_kwargs=EasyDict(words))
    return what


def _files():
    good = tiny_pickle()
    saved = io.BytesIO()
    torch.save({"ema": torch.ones(2)}, saved)
    return {
        "empty file": b"",
        "one byte": b"\x80",
        "text file": b"hello\n" * 100,
        "source text": SOURCE.encode(),
        "zeros": bytes(10_000),
        "a torch file": saved.getvalue(),
        "a zip": _zip(10**6),
        "trailing bytes": good + b"\0",
        "twice": good + good,
        "no ema": dump({"G_ema": None}),
        "a list": dump([1, 2]),
        "laughs as the network": b"\x80\x04}" + text("ema") + laughs(60) + b"s.",
    }


def harmless():
    """Files that Python's own unpickler would not survive, or that look odd, and that load as any other."""
    known = named("collections", "OrderedDict") + b")R"
    return {
        "laughs that nobody reads": wrap(laughs(60)),
        "deep laughs that nobody reads": wrap(laughs(500)),
        "ten laughs": wrap(b"(" + 10 * laughs(50) + b"t"),
        "attributes named like methods": wrap(known + text("__setstate__") + b"Ns"),
        "a number as a key": wrap(b"}K\x01K\x02s"),
    }


def corpus(canary):
    """Every hostile file, by name."""
    parts = (_structure(canary), _bombs(), _nested(canary), _tensors(), _descriptions(), _modules(), _files())
    return {name: raw for part in parts for name, raw in part.items()}
