"""Captions of images: files of them, and the choice of 30,000 that text-to-image models are compared on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fanal.errors import FanalError, reason, unknown_name
from fanal.files import write_atomically

__all__ = ["PROTOCOL", "Captions", "choose_captions", "read_captions", "write_captions"]

PROTOCOL = 30_000
"""Number of captions that text-to-image models are commonly compared on."""

_FILE_BYTES = 2**29
_TEXT_CHARACTERS = 10_000
_HEADER = ("id", "caption")


@dataclass(frozen=True)
class Captions:
    """Captions in order, each with the id of its image; an id may have several.

    Attributes:
        ids: names of the images; line numbers from 0 where a file has none.
        texts: the captions.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.texts) or not self.texts:
            raise FanalError(f"captions need one id each, got {len(self.ids)} ids for {len(self.texts)} captions")
        for i, text in enumerate(self.texts):
            if not text.strip() or len(text) > _TEXT_CHARACTERS:
                raise FanalError(
                    f"caption {i + 1} has {len(text.strip())} characters: a caption has 1 to {_TEXT_CHARACTERS}"
                )


def read_captions(path: str | Path) -> Captions:
    """Read captions from a UTF-8 file of at most 512 MiB.

    `.txt`: one per line. `.tsv`: an image's id, a tab, and a caption on each line; a first line "id, tab, caption" is a
    heading. `.json`: the format of COCO's captions, `{"annotations": [{"image_id": 1, "caption": "…"}, …]}`. White
    space within a caption becomes one space.

    Raises:
        FanalError: the file is missing, too large, not UTF-8, or not of that form.
    """
    file = Path(path)
    readers = {".txt": _lines, ".tsv": _table, ".json": _coco}
    if file.suffix not in readers:
        raise unknown_name("kind of caption file", file.suffix or file.name, readers)
    try:
        if file.stat().st_size > _FILE_BYTES:
            raise FanalError(f"{file} is larger than {_FILE_BYTES} bytes, which no file of captions is")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FanalError(f"cannot read {file}: {reason(error)}") from error
    try:
        return readers[file.suffix](text)
    except FanalError as error:
        raise FanalError(f"{file}: {error}") from error


def _split(text: str) -> list[str]:
    """Lines without the empty ones at the end; only line feeds end a line."""
    return text.replace("\r\n", "\n").rstrip("\n").split("\n")


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _lines(text: str) -> Captions:
    texts = tuple(_tidy(line) for line in _split(text))
    return Captions(tuple(str(i) for i in range(len(texts))), texts)


def _table(text: str) -> Captions:
    rows = [tuple(line.split("\t")) for line in _split(text)]
    start = 1 if rows[0] == _HEADER else 0
    for i, row in enumerate(rows[start:], start + 1):
        if len(row) != 2:
            raise FanalError(f"line {i} must be an id, a tab and a caption, got {len(row)} columns")
    return Captions(tuple(row[0].strip() for row in rows[start:]), tuple(_tidy(row[1]) for row in rows[start:]))


def _coco(text: str) -> Captions:
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FanalError(f"not JSON: {error}") from error
    entries = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise FanalError('not COCO captions: expected {"annotations": [{"image_id": 1, "caption": "…"}, …]}')
    ids, texts = [], []
    for i, entry in enumerate(entries):
        image, caption = (entry.get("image_id"), entry.get("caption")) if isinstance(entry, dict) else (None, None)
        if type(image) not in (int, str) or not isinstance(caption, str):
            raise FanalError(f"annotation {i} must have an image_id and a caption, got {entry!r:.80}")
        ids.append(str(image))
        texts.append(_tidy(caption))
    return Captions(tuple(ids), tuple(texts))


def choose_captions(captions: Captions, count: int = PROTOCOL, seed: int = 0) -> Captions:
    """Choose `count` images, and one caption of each, in a random order that depends on the seed alone.

    The choice does not depend on the order of the file. Record the result (`write_captions`): figures can be compared
    only on the same captions.

    Args:
        captions: any number per image.
        count: how many.
        seed: of the choice.

    Raises:
        FanalError: there are fewer images.
    """
    by_id: dict[str, list[str]] = {}
    for name, text in sorted(zip(captions.ids, captions.texts, strict=True)):
        by_id.setdefault(name, []).append(text)
    if not 1 <= count <= len(by_id):
        raise FanalError(f"there are captions of {len(by_id)} images, so count must be in [1, {len(by_id)}]: {count}")
    random = np.random.default_rng(seed)
    one_each = {name: texts[random.integers(len(texts))] for name, texts in by_id.items()}
    names = list(one_each)
    chosen = [names[i] for i in random.permutation(len(names))[:count]]
    return Captions(tuple(chosen), tuple(one_each[name] for name in chosen))


def write_captions(path: str | Path, captions: Captions) -> None:
    """Write captions as `.tsv`, in their order.

    Raises:
        FanalError: the path has another suffix, an id has a tab or a line feed in it, or the place cannot be written.
    """
    file = Path(path)
    if file.suffix != ".tsv":
        raise FanalError(f"captions are written as .tsv, got {file.name}")
    rows = [_HEADER, *zip(captions.ids, map(_tidy, captions.texts), strict=True)]
    if any("\t" in name or "\n" in name for name, _ in rows):
        raise FanalError("an image's id with a tab or a line feed in it does not fit into a .tsv file")
    content = "".join(f"{name}\t{text}\n" for name, text in rows)
    write_atomically(file, lambda part: part.write_text(content, encoding="utf-8", newline="\n"))
