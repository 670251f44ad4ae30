"""Where image files lie: a folder or a zip file, both read where they are, and a `dataset.json` that labels them."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, cast, runtime_checkable

from fanal.datasets.decoding import SUFFIXES, Unusable
from fanal.errors import FanalError, reason
from fanal.files import sha256_of

__all__ = ["Archive", "Directory", "Source", "json_labels", "source"]

_LABELS = "dataset.json"
_MEMBER_BYTES = 2**28  # of one file; the largest image that is decoded at all has about as many
_LABELS_BYTES = 2**28
_MEMBERS = 2**23
_RATIO, _RATIO_FROM = 200, 2**20  # image files hardly shrink: this much smaller, from 1 MiB on, is a bomb
_CLASSES = 2**16


@runtime_checkable
class Source(Protocol):
    """Named image files."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the images, with "/", sorted folder by folder."""
        ...

    @property
    def label_file(self) -> bytes | None:
        """The content of `dataset.json`, if there is one."""
        ...

    def open(self, name: str) -> io.BufferedIOBase:
        """Open an image.

        Raises:
            Unusable: it cannot be read, or its size cannot be that of an image.
        """
        ...

    def digest(self) -> str:
        """Return a hash of all bytes: of the images with their names, and of the labels.

        Raises:
            FanalError: a file cannot be read.
        """
        ...


def source(path: Path) -> Source:
    """Return the folder or zip file at `path`.

    Raises:
        FanalError: there is neither, it holds no images, or the zip file is damaged or hostile.
    """
    found = Directory(path) if path.is_dir() else Archive(path)
    if not found.names:
        raise FanalError(f"no images in {path}: looked for {', '.join(sorted(SUFFIXES))} in it and its subfolders")
    return found


def _is_image(name: str) -> bool:
    """Whether a name is that of an image, not of a hidden file or in a hidden folder."""
    parts = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in parts.parts)
    return parts.suffix.lower() in SUFFIXES and not hidden


def _sorted(names: list[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: name.split("/")))


class Directory:
    """The images in a folder and its subfolders.

    Raises:
        FanalError: the folder cannot be listed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            files = [f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()]
        except OSError as error:
            raise FanalError(f"cannot list {path}: {reason(error)}") from error
        self.names = _sorted([name for name in files if _is_image(name)])

    @property
    def label_file(self) -> bytes | None:
        """The content of `dataset.json`, if there is one."""
        path = self.path / _LABELS
        try:
            if not path.is_file():
                return None
            if path.stat().st_size > _LABELS_BYTES:
                raise FanalError(f"{path} is larger than {_LABELS_BYTES} bytes: not a list of labels")
            return path.read_bytes()
        except OSError as error:
            raise FanalError(f"cannot read {path}: {reason(error)}") from error

    def open(self, name: str) -> io.BufferedIOBase:
        """Open an image."""
        try:
            return (self.path / name).open("rb")
        except OSError as error:
            raise Unusable(f"cannot be opened ({reason(error)})") from error

    def digest(self) -> str:
        """Return a hash of all images with their names, and of the labels."""
        found = hashlib.sha256(self.label_file or b"")
        for name in self.names:
            found.update(f"\0{name}\0{sha256_of(self.path / name)}".encode("utf-8", "surrogateescape"))
        return found.hexdigest()


class Archive:
    """The images in a zip file; each is read when it is needed, and nothing is extracted to the disk.

    A folder that holds everything is left out of the names.

    Raises:
        FanalError: the file is missing, truncated or no zip file, or has members with dangerous names.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = zipfile.ZipFile(path)
            members = self._file.infolist()
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise FanalError(f"{path} is no whole zip file ({reason}): was its download or copy cut short?") from error
        if len(members) > _MEMBERS:
            raise FanalError(f"{path} has {len(members)} members, at most {_MEMBERS}: split it")
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            if member.is_dir():
                continue
            _check_name(member, path)
            if _is_image(member.filename) or PurePosixPath(member.filename).name == _LABELS:
                if member.filename in self._members:
                    raise FanalError(f"{path} holds {member.filename!r:.200} twice: pack it again")
                self._members[member.filename] = member
        self._strip()
        self.names = _sorted([name for name in self._members if _is_image(name)])

    def _strip(self) -> None:
        """Leave out the folders that hold everything."""
        while self._members:
            tops = {name.partition("/")[0] for name in self._members}
            if len(tops) > 1 or not all("/" in name for name in self._members):
                return
            self._members = {name.partition("/")[2]: member for name, member in self._members.items()}

    @property
    def label_file(self) -> bytes | None:
        """The content of `dataset.json`, if there is one."""
        if _LABELS not in self._members:
            return None
        try:
            return self._read(_LABELS, _LABELS_BYTES)
        except Unusable as error:
            raise FanalError(f"{_LABELS} in {self.path} {error}") from error

    def _read(self, name: str, limit: int) -> bytes:
        member = self._members[name]
        if member.flag_bits & 1:
            raise Unusable("is encrypted: pack it without a password")
        if member.file_size > limit:
            raise Unusable(f"is too large ({member.file_size} bytes, at most {limit})")
        if member.file_size > _RATIO_FROM and member.file_size > _RATIO * member.compress_size:
            raise Unusable(f"is too large: {member.file_size} bytes were packed into {member.compress_size}")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Unusable("is packed in an uncommon way: use deflate or no compression")
        try:
            with self._file.open(member) as stream:
                return stream.read(member.file_size + 1)  # never unpacks more, whatever follows
        except Exception as error:  # zlib, bz2, lzma and zipfile each have their own
            raise Unusable(f"is damaged in the zip file ({error})") from error

    def digest(self) -> str:
        """Return a hash of the file."""
        return sha256_of(self.path)

    def open(self, name: str) -> io.BufferedIOBase:
        """Open an image."""
        return io.BytesIO(self._read(name, _MEMBER_BYTES))


def _check_name(member: zipfile.ZipInfo, path: Path) -> None:
    name = member.filename
    parts = name.split("/")
    link = stat.S_ISLNK(member.external_attr >> 16)
    if name.startswith("/") or "\\" in name or ".." in parts or ":" in parts[0] or "\0" in name or link:
        raise FanalError(f"{path} holds a member named {name!r:.200}, which could lead out of it: do not trust it")


def json_labels(content: bytes, names: tuple[str, ...], where: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the classes and the class of each image from a `dataset.json`: `{"labels": [["a/0.png", 3], …]}`.

    `{"labels": null}` says that there are no classes. Labels of files that are not there are ignored.

    Args:
        content: the file.
        names: the images that need a label.
        where: name of the set, for errors.

    Raises:
        FanalError: the file is no such JSON, a label is no small whole number, or an image has none.
    """
    try:
        labels = json.loads(content)["labels"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FanalError(f'{_LABELS} of {where} is not {{"labels": [["NAME", CLASS], …]}} or null: {error}') from error
    if labels is None:
        return (), {}
    found: dict[str, int] = {}
    for entry in labels if isinstance(labels, list) else [labels]:
        pair = cast(list[Any], entry) if isinstance(entry, list) and len(entry) == 2 else [None, None]
        if not isinstance(pair[0], str) or type(pair[1]) is not int or not 0 <= pair[1] < _CLASSES:
            raise FanalError(
                f'{_LABELS} of {where}: each label must look like ["NAME", CLASS] with a class in [0, {_CLASSES}), '
                f"got {entry!r:.80}"
            )
        found[pair[0]] = pair[1]
    missing = [name for name in names if name not in found]
    if missing:
        raise FanalError(
            f"{_LABELS} of {where} has no label for {len(missing)} of {len(names)} images; the first is {missing[0]}"
        )
    highest = max(found[name] for name in names)
    return tuple(str(label) for label in range(highest + 1)), {name: found[name] for name in names}
