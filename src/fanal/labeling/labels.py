"""A person's labels of a run: the classes to choose from, and a file that is whole after every click."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fanal.datasets import DATASETS
from fanal.errors import FanalError, reason, unknown_name
from fanal.files import read_json, read_tensors, sha256_of, write_json
from fanal.preparation import record_of

__all__ = ["FORMAT", "KEYS", "TAXONOMIES", "Labels", "Samples", "Taxonomy", "open_labels", "read_samples", "taxonomy"]

FORMAT = "fanal-labels-1"
"""What a label file says it is."""

KEYS = "123456789qwertyiop"
"""Keys of the classes, in order; 0 is "unsure", u is undo."""

_LONGEST, _LARGEST = 60, 64 * 1024  # characters of a class's name, bytes of a taxonomy file
_NONE = object()


@dataclass(frozen=True)
class Taxonomy:
    """What a person may call a sample.

    Args:
        name: where the classes come from.
        classes: names; the first is "right", all others say what is wrong. "unsure" is always offered beside them.

    Raises:
        FanalError: there are fewer than two or more than 18, or a name is empty, too long, taken twice, or "unsure".
    """

    name: str
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.classes) <= len(KEYS):
            raise FanalError(f"a taxonomy has 2 to {len(KEYS)} classes, {self.name} has {len(self.classes)}")
        for name in self.classes:
            if not isinstance(name, str) or not name.strip() or len(name) > _LONGEST or not name.isprintable():
                raise FanalError(f"a class is named in 1 to {_LONGEST} printable characters, got {name!r:.80}")
        if len({*self.classes, "unsure"}) <= len(self.classes):
            raise FanalError(f'the classes of {self.name} must differ, and none may be "unsure": it is offered anyway')


TAXONOMIES: Mapping[str, Taxonomy] = {
    "hands": Taxonomy(
        "hands",
        (
            "right",
            "extra fingers",
            "missing fingers",
            "wrong finger structure",
            "abnormal palm",
            "several hands",
            "unrecognizable",
        ),
    ),
    "faces": Taxonomy("faces", ("right", "wrong")),
}
"""The two ways to label of [RODS] B.6: hands get one of seven classes, faces are right or wrong."""


def taxonomy(spec: str) -> Taxonomy:
    """Return the classes that a spec names: a key of `TAXONOMIES`, a data set with a verifier, or a text file.

    A file has one class per line, "right" first; empty lines and those that begin with # are skipped.

    Raises:
        FanalError: there is no such taxonomy or file, or its classes are none.
    """
    if spec in TAXONOMIES:
        return TAXONOMIES[spec]
    judged = {name: d.verdicts for name, d in DATASETS.items() if d.verdicts}
    if spec in judged:
        return Taxonomy(spec, ("right", *judged[spec][1:]))
    path = Path(spec)
    if not path.is_file():
        raise unknown_name("taxonomy", spec, [*TAXONOMIES, *judged, "a text file with one class per line"])
    try:
        if path.stat().st_size > _LARGEST:
            raise FanalError(f"{path} is larger than {_LARGEST} bytes, which no list of classes is")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FanalError(f"cannot read the taxonomy {path}: {reason(error)}") from error
    return Taxonomy(path.name, tuple(line for line in lines if line and not line.startswith("#")))


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a run that a person looks at.

    Attributes:
        folder: the run folder.
        tensor: name of the samples in it.
        watched: whether they are those that the detector watched: before any repair.
        x: the samples, (N, *shape); images for a model of latents.
        risk: their risks, (N,), where a detector watched.
        verdict: the verifier's codes, (N,), where there is one.
        verdicts: what the codes mean.
        first_seed: seed of sample 0.
        data: data set whose verifier judged them, or "".
        sha256: of the file that holds them.
    """

    folder: Path
    tensor: str
    watched: bool
    x: Tensor
    risk: Tensor | None
    verdict: Tensor | None
    verdicts: tuple[str, ...]
    first_seed: int | None
    data: str
    sha256: str

    @property
    def file(self) -> Path:
        """Where their labels are kept: `labels.json` for those that the detector watched."""
        return self.folder / ("labels.json" if self.watched else f"labels.{self.tensor}.json")


def read_samples(folder: str | Path, tensor: str | None = None) -> Samples:
    """Read a run's samples.

    Args:
        folder: run folder.
        tensor: which of its samples; None: those before any repair, which the risks belong to.

    Raises:
        FanalError: the folder is no finished run of samples, or has no such tensor.
    """
    from fanal.pictures import shown

    folder = Path(folder)
    record = record_of(folder)
    tensors, _ = read_tensors(folder / "samples.safetensors")
    plain = "before" if "before" in tensors else "x"
    name = tensor or plain
    known = [key for key in tensors if key == "before" or key.partition(".")[0] == "x"]
    if name not in known:
        raise unknown_name(f"samples in {folder}", name, known)
    guard = [str(text).partition(":")[0] for text in record.get("config", {}).get("guard") or [] if text != "none"]
    stage = "" if name == plain else name.partition(".")[2] or (guard[0] if guard else "")
    tail = f".{stage}" if stage else ""
    results, seeds = record.get("results", {}), record.get("seeds", {})
    verdicts = tuple(results.get("verdicts") or ())
    verdict = tensors.get(f"verdict{tail}") if verdicts else None
    return Samples(
        folder,
        name,
        name == plain,
        shown(tensors, name),
        tensors.get(f"risk{tail}"),
        verdict,
        verdicts,
        seeds.get("first") if isinstance(seeds.get("first"), int) else None,
        next((d.name for d in DATASETS.values() if verdicts and d.verdicts == verdicts), ""),
        sha256_of(folder / "samples.safetensors"),
    )


class Labels:
    """The labels of a run's samples; each change is on the disk before it counts.

    Args:
        path: label file.
        count: number of samples.
        head: what the file says beside the labels.
        chosen: classes to choose from.
        seed: of the order in which the samples are shown.
        codes: sample → class, None for "unsure"; in the order in which they were given.
    """

    def __init__(
        self,
        path: Path,
        count: int,
        head: Mapping[str, Any],
        chosen: Taxonomy,
        seed: int,
        codes: Mapping[int, int | None] | None = None,
    ) -> None:
        self.path, self.count, self.taxonomy = path, count, chosen
        self.head = {"format": FORMAT, **head, "taxonomy": chosen.name, "classes": list(chosen.classes), "seed": seed}
        self.codes: dict[int, int | None] = dict(codes or {})
        self.order = list(range(count))
        random.Random(seed).shuffle(self.order)
        self._before: list[tuple[int, Any]] = [(sample, _NONE) for sample in self.codes]

    def set(self, sample: int, code: int | None) -> None:
        """Label a sample with a class, or None for "unsure", and save.

        Raises:
            FanalError: there is no such sample or class, or the file cannot be written; then nothing has changed.
        """
        whole = isinstance(sample, int) and not isinstance(sample, bool)
        if not whole or not 0 <= sample < self.count:
            raise FanalError(f"the samples are 0 to {self.count - 1}, got {sample!r:.40}")
        classes = self.taxonomy.classes
        if code is not None and (isinstance(code, bool) or not isinstance(code, int) or not 0 <= code < len(classes)):
            raise FanalError(f"the classes are 0 to {len(classes) - 1}, or null for unsure, got {code!r:.40}")
        after = {key: value for key, value in self.codes.items() if key != sample} | {sample: code}
        self._save(after)
        self._before.append((sample, self.codes.get(sample, _NONE)))
        self.codes = after

    def undo(self) -> int | None:
        """Take the last change back and save; return its sample, or None where there is nothing to undo.

        Raises:
            FanalError: the file cannot be written; then nothing has changed.
        """
        if not self._before:
            return None
        sample, code = self._before[-1]
        after = {key: value for key, value in self.codes.items() if key != sample}
        if code is not _NONE:
            after[sample] = code
        self._save(after)
        self._before.pop()
        self.codes = after
        return sample

    def _save(self, codes: Mapping[int, int | None]) -> None:
        write_json(self.path, {**self.head, "labels": {str(sample): code for sample, code in codes.items()}})


def open_labels(samples: Samples, spec: str | None = None, seed: int | None = None) -> Labels:
    """Return the labels that a run has so far, or none yet.

    Args:
        samples: what is labeled.
        spec: taxonomy, as `taxonomy` takes it; None: that of the file, else the verdicts of the data's verifier, else
            "hands".
        seed: of the order; None: that of the file, else 0.

    Raises:
        FanalError: the file is damaged, or belongs to other samples or classes.
    """
    path, wanted = samples.file, None if spec is None else taxonomy(spec)
    head = {"tensor": samples.tensor, "samples": samples.sha256, "count": len(samples.x)}
    if not path.exists():
        return Labels(path, len(samples.x), head, wanted or taxonomy(samples.data or "hands"), seed or 0)
    value = read_json(path)
    if value.get("format") != FORMAT:
        raise FanalError(f"{path} is no label file (format {value.get('format')!r:.40}, wanted {FORMAT})")
    if {key: value.get(key) for key in head} != head:
        raise FanalError(f"{path} belongs to other samples than {samples.folder} holds now: move it away to start over")
    try:
        kept = Taxonomy(str(value["taxonomy"]), tuple(value["classes"]))
        codes = _codes(value["labels"], len(samples.x), len(kept.classes))
        old = value["seed"]
        if isinstance(old, bool) or not isinstance(old, int):
            raise ValueError("seed")
    except (KeyError, TypeError, ValueError) as error:
        raise FanalError(f"{path} is damaged ({error!s:.120}): move it away to start over") from error
    if wanted is not None and wanted.classes != kept.classes:
        raise FanalError(
            f"{path} was begun with the classes {', '.join(kept.classes)}; leave --taxonomy out to go on with them, or "
            "move the file away to start over"
        )
    return Labels(path, len(samples.x), head, kept, old if seed is None else seed, codes)


def _codes(found: Any, count: int, classes: int) -> dict[int, int | None]:
    """Labels as a file has them: sample → class or None."""
    if not isinstance(found, dict):
        raise ValueError("labels")
    codes = {int(key): value for key, value in found.items()}
    for sample, code in codes.items():
        right = code is None or (isinstance(code, int) and not isinstance(code, bool) and 0 <= code < classes)
        if not right or not 0 <= sample < count:
            raise ValueError(f"label {code!r:.40} of sample {sample}")
    return codes
