"""A reader of pickles that runs nothing: it follows the opcodes, and what would be a call becomes a record.

Python's own unpickler calls what a file names. This one has no way to call anything: a name outside a fixed list is
an error, a call on that list is kept as a `Call`, and byte strings stay in the file as `Blob`s until they are asked
for. Memory and time are bounded by the size of the file and by limits on opcodes, text and nesting.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from fanal.errors import FanalError

__all__ = ["Blob", "Call", "Global", "Persistent", "Source", "kind_of", "read_pickle"]

_OPCODES = 2**18  # the largest published network needs about 80,000
_TEXT_BYTES = 2**25  # of one pickle: each class's source text stands in the file once
_NESTING = 200


@dataclass(frozen=True, slots=True)
class Global:
    """A name that a pickle asks for, never looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class Blob:
    """A byte string that was left in the file: its place and its length."""

    start: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """A reference to something outside the pickle; only storages have one."""

    key: object


@dataclass(slots=True, eq=False)
class Call:
    """A call that a pickle asks for, never made: the name, its arguments, and what it would be filled with."""

    name: str
    args: tuple[object, ...]
    state: object = None
    items: list[tuple[object, object]] = field(default_factory=list)


class Source:
    """The part of a file from `start` to `end`, read in order; asking for more than is there is an error."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self.file, self.position, self.end = file, start, end
        file.seek(start)

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes.

        Raises:
            FanalError: the file is shorter than that.
        """
        data = self.file.read(size) if size <= self.end - self.position else b""
        if len(data) != size:
            raise FanalError(f"the file is cut off: {size} bytes wanted at {self.position}, it ends at {self.end}")
        self.position += size
        return data

    def skip(self, size: int) -> Blob:
        """Pass over the next `size` bytes, and say where they are.

        Raises:
            FanalError: the file is shorter than that.
        """
        if size > self.end - self.position:
            raise FanalError(f"the file is cut off: {size} bytes wanted at {self.position}, it ends at {self.end}")
        blob = Blob(self.position, size)
        self.position += size
        self.file.seek(self.position)
        return blob

    def number(self, form: str) -> int:
        """Return the next number, packed as `struct` says."""
        return cast(int, struct.unpack(form, self.read(struct.calcsize(form)))[0])


def kind_of(value: object) -> str:
    """Describe a value in a few words, without looking into it: a small file can hold enormous values."""
    if value is None or type(value) in (bool, float):
        return repr(value)
    if type(value) is int:
        return repr(value) if abs(value) < 2**64 else "a huge number"
    if isinstance(value, str):
        return repr(value[:60])
    if isinstance(value, (Call, Global)):
        return value.name
    return f"a {type(value).__name__}"


def _hashable(value: object) -> bool:
    """Whether a value may be a key: a text, or a whole number small enough that no two share a hash."""
    return type(value) is str or (type(value) is int and abs(value) < 2**31)


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(self, source: Source, known: Mapping[str, str], persistent: bool) -> None:
        self.source, self.known, self.persistent = source, known, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.text_left = _TEXT_BYTES

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise FanalError("the pickle takes a value that is not there")
        return self.stack.pop()

    def top(self) -> object:
        value = self.pop()
        self.stack.append(value)
        return value

    def since_mark(self) -> list[object]:
        if not self.marks:
            raise FanalError("the pickle goes back to a mark that is not there")
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def text(self, size: int) -> None:
        self.text_left -= size
        if self.text_left < 0:
            raise FanalError(f"the pickle holds texts of more than {_TEXT_BYTES} bytes")
        try:
            self.push(self.source.read(size).decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise FanalError("the pickle holds a text that is no UTF-8") from error

    def long(self) -> None:
        size = self.source.number("<B")
        if size > 16:
            raise FanalError(f"the pickle holds a number of {size} bytes, at most 16 are allowed")
        self.push(int.from_bytes(self.source.read(size), "little", signed=True))

    def protocol(self) -> None:
        version = self.source.number("<B")
        if not 2 <= version <= 5:
            raise FanalError(f"pickle protocol {version} is not read, only 2 to 5")

    def frame(self) -> None:
        size = self.source.number("<Q")
        if size > self.source.end - self.source.position:
            raise FanalError(f"the file is cut off: a frame of {size} bytes is announced, the file ends before")

    def remember(self, index: int) -> None:
        if index > _OPCODES:
            raise FanalError(f"the pickle keeps a value under the number {index}, at most {_OPCODES} are allowed")
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise FanalError(f"the pickle recalls value {index}, which it never kept")
        self.push(self.memo[index])

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def append(self, values: list[object]) -> None:
        target = self.top()
        if type(target) is not list:
            raise FanalError(f"the pickle appends to {kind_of(target)}, only lists are filled so")
        target.extend(values)

    def add(self, values: list[object]) -> None:
        target = self.top()
        if type(target) is not set or not all(map(_hashable, values)):
            raise FanalError("the pickle adds no text or small whole number to a set, or adds to what is no set")
        target.update(values)

    def put_items(self, values: list[object]) -> None:
        target = self.top()
        keys = values[::2]
        if len(values) % 2 or not all(map(_hashable, keys)):
            raise FanalError("the pickle fills a dict with keys that are neither text nor small whole numbers")
        pairs = zip(keys, values[1::2], strict=True)
        if type(target) is dict:
            target.update(pairs)
        elif type(target) is Call and "items" in self.known[target.name]:
            target.items.extend(pairs)
        else:
            raise FanalError(f"the pickle fills {kind_of(target)} like a dict")

    def name(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str or f"{module}.{name}" not in self.known or "." in name:
            asked = f"{module}.{name}" if type(module) is str and type(name) is str else "a name that is no text"
            raise FanalError(f"the pickle asks for {asked[:120]!r}, which no such checkpoint needs: it is not read")
        self.push(Global(f"{module}.{name}"))

    def line(self) -> str:
        raw = bytearray()
        while (byte := self.source.read(1)) != b"\n":
            raw += byte
            if len(raw) > 256:
                raise FanalError("the pickle asks for a name of more than 256 bytes")
        return raw.decode("ascii", "replace")

    def stack_name(self) -> None:
        name = self.pop()
        self.name(self.pop(), name)

    def call(self) -> None:
        args, function = self.pop(), self.pop()
        if type(function) is not Global or type(args) is not tuple:
            raise FanalError(f"the pickle calls {kind_of(function)} with {kind_of(args)}: it is not read")
        self.push(Call(function.name, args))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if type(target) is not Call or "state" not in self.known[target.name] or target.state is not None:
            raise FanalError(f"the pickle sets the state of {kind_of(target)}: it is not read")
        target.state = state

    def refer(self) -> None:
        if not self.persistent:
            raise FanalError("the pickle refers to something outside of it (a persistent id): it is not read")
        self.push(Persistent(self.pop()))

    def run(self) -> object:
        """Follow the opcodes to the end of the pickle."""
        for _ in range(_OPCODES):
            code = self.source.read(1)
            if code == b".":
                result = self.pop()
                if self.stack or self.marks:
                    raise FanalError("the pickle ends with more than one value")
                return result
            action = _ACTIONS.get(code)
            if action is None:
                raise FanalError(f"the pickle uses opcode {code!r}, which no such checkpoint needs: it is not read")
            action(self)
        raise FanalError(f"the pickle has more than {_OPCODES} opcodes")


def _number(form: str) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.source.number(form))


_ACTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": _number("<i"),
    b"K": _number("<B"),
    b"M": _number("<H"),
    b"\x8a": _Machine.long,
    b"G": _number(">d"),
    b"\x8c": lambda m: m.text(m.source.number("<B")),
    b"X": lambda m: m.text(m.source.number("<I")),
    b"\x8d": lambda m: m.text(m.source.number("<Q")),
    b"C": lambda m: m.push(m.source.skip(m.source.number("<B"))),
    b"B": lambda m: m.push(m.source.skip(m.source.number("<I"))),
    b"\x8e": lambda m: m.push(m.source.skip(m.source.number("<Q"))),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"]": lambda m: m.push([]),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.since_mark()),
    b"}": lambda m: m.push({}),
    b"s": lambda m: m.put_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.put_items(m.since_mark()),
    b"\x8f": lambda m: m.push(set()),
    b"\x90": lambda m: m.add(m.since_mark()),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"q": lambda m: m.remember(m.source.number("<B")),
    b"r": lambda m: m.remember(m.source.number("<I")),
    b"h": lambda m: m.recall(m.source.number("<B")),
    b"j": lambda m: m.recall(m.source.number("<I")),
    b"c": lambda m: m.name(m.line(), m.line()),
    b"\x93": _Machine.stack_name,
    b"R": _Machine.call,
    b"\x81": _Machine.call,
    b"b": _Machine.build,
    b"Q": _Machine.refer,
}


def _inside(value: object) -> list[object]:
    """What a container holds."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, Call):
        return [*value.args, value.state, *(item for _, item in value.items)]
    return [value.key] if isinstance(value, Persistent) else []


def _check_nesting(root: object) -> None:
    """Refuse what is nested deeper than any checkpoint; each value is looked at once, however often it is used."""
    seen: set[int] = set()
    layer = [root]
    for _ in range(_NESTING):
        inner: list[object] = []
        for value in layer:
            if id(value) not in seen:
                seen.add(id(value))
                inner.extend(_inside(value))
        if not inner:
            return
        layer = inner
    raise FanalError(f"the pickle nests values more than {_NESTING} deep")


def read_pickle(source: Source, known: Mapping[str, str], persistent: bool = False) -> object:
    """Read one pickle: plain values as they are, everything else as records.

    Args:
        source: where the pickle starts; it is left right behind the pickle's end.
        known: the names that may be asked for, as `module.name`, and how a call to each may be filled afterwards:
            with `items` like a dict, with a `state`, with both, or (an empty text) not at all. A name becomes a
            `Global`, never the object itself.
        persistent: whether references to something outside the pickle are read.

    Returns:
        None, bool, int, float, str, list, tuple, dict, set, `Blob`, `Global`, `Call` or `Persistent`, nested.

    Raises:
        FanalError: the pickle is cut off or malformed, asks for another name, uses an opcode that checkpoints do not
            need, or exceeds a limit.
    """
    result = _Machine(source, known, persistent).run()
    _check_nesting(result)
    return result
