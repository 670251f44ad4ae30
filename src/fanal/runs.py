"""Run folders: written beside their place, resumed block by block, renamed into place when whole."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from fanal import __version__
from fanal.errors import FanalError, reason
from fanal.files import read_json, read_tensors, write_json, write_tensors

__all__ = ["Block", "Progress", "Run", "cpu_threads", "quiet", "versions"]

_BLOCKS = "*-[0-9]*.safetensors"

Block = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors of some rows (axis 0) and notes (plain JSON)."""

Progress = Callable[[Iterable[int], str], Iterable[int]]
"""Wraps a loop over blocks, given what it does: a progress bar, or `quiet`."""


def quiet(items: Iterable[int], what: str) -> Iterable[int]:
    """Show no progress."""
    return items


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with so many CPU threads, which decide rounding, and go back to as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str]:
    """Return the versions that figures depend on."""
    own = {"fanal": __version__, "torch": torch.__version__, "numpy": np.__version__}
    return {**own, "python": platform.python_version()}


class Run:
    """A run folder in the making; use it as a context manager.

    Work is stored block by block in a hidden folder beside `out`; `finish` renames that folder into place. Left by an
    interruption, it is resumed by the same command; left by an error before any block was whole, it is removed.

    Args:
        out: the run folder.
        command: name of the command.
        config: the resolved configuration, as plain JSON; it decides what a block contains.
        identity: what else decides the numbers, e.g. the hash of the model's file and the device's name.
        overwrite: replace a finished run, and discard an unfinished one with other settings.

    Raises:
        FanalError: `out` is finished, is no run folder, cannot be written, or an unfinished run has other settings.
    """

    def __init__(
        self,
        out: str | Path,
        command: str,
        config: Mapping[str, Any],
        *,
        identity: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.out, self.command, self.config = Path(os.path.abspath(out)), command, dict(config)
        if not self.out.name:
            raise FanalError(f"{self.out} cannot be a run folder; choose another --out")
        self.overwrite, self.resumed = overwrite, 0
        self.head = {
            "command": command,
            "config": self.config,
            "versions": versions(),
            "identity": dict(identity or {}),
        }
        self.part = self.out.with_name(f".{self.out.name}.part")
        self._lock = FileLock(self.out.with_name(f".{self.out.name}.lock"), timeout=0)
        self._check_target(overwrite)
        self._acquire()
        try:
            self._open_part(overwrite)
        except BaseException:
            self._release()
            raise

    def _check_target(self, overwrite: bool) -> None:
        if not os.path.lexists(self.out) or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        if not _is_record(self.out / "run.json"):
            raise FanalError(f"{self.out} exists and is not a run folder; choose another --out")
        if not overwrite:
            raise FanalError(
                f"{self.out} holds a finished run; choose another --out or pass --overwrite; fanal report {self.out} "
                "shows what it found"
            )

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            raise FanalError(
                f"another process is working on {self.out}: wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise FanalError(f"cannot write {self.out}: {reason(error)}; try another --out") from error

    def _release(self) -> None:
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def _open_part(self, overwrite: bool) -> None:
        head = json.loads(json.dumps(self.head))
        marker = self.part / "run.json"
        if marker.is_file():
            old = read_json(marker)
            if {key: old.get(key) for key in head} == head:
                self.resumed = len(list(self.part.glob("block-*.safetensors")))
                return
            if not overwrite:
                changed = _first_difference(old, head)
                if old.get("identity") != head["identity"] and old.get("config") == head["config"]:
                    raise FanalError(
                        f"the model or the device is not what the unfinished run at {self.part} began with "
                        f"({changed}); bring it back, or pass --overwrite to start over"
                    )
                raise FanalError(
                    f"an unfinished run with other settings ({changed}) is at {self.part}; run its own command again "
                    "to finish it, or pass --overwrite to discard it"
                )
        elif self.part.exists() and any(not path.name.startswith(".run.json.part") for path in self.part.iterdir()):
            raise FanalError(f"{self.part} is in the way and is not fanal's: move it, or choose another --out")
        shutil.rmtree(self.part, ignore_errors=True)
        try:
            write_json(marker, head)
        except FanalError:
            shutil.rmtree(self.part, ignore_errors=True)
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()
        started = self.part.is_dir() and any(self.part.glob(_BLOCKS))
        if error is not None and not started and not isinstance(error, KeyboardInterrupt):
            shutil.rmtree(self.part, ignore_errors=True)

    def path(self, name: str) -> Path:
        """Return where a file of the run is written until the run is finished."""
        return self.part / name

    def block(self, index: int, work: Callable[[], Block], *, stage: str = "block") -> Block:
        """Return the tensors and notes of one block: read if it was stored, else computed and stored.

        Args:
            index: number of the block.
            work: computes its tensors (axis 0: samples) and its notes (plain JSON).
            stage: what it is a block of, where a run has several kinds.

        Raises:
            FanalError: the disk is full, or as `work`.
        """
        path = self.part / f"{stage}-{index:06d}.safetensors"
        if path.is_file():
            tensors, header = read_tensors(path)
            return tensors, json.loads(header["notes"])
        tensors, notes = work()
        tensors = {name: value.cpu() for name, value in tensors.items()}  # a long run must not fill an accelerator
        write_tensors(path, tensors, {"notes": json.dumps(notes)})
        return tensors, notes

    def blocks(
        self,
        rows: range,
        size: int,
        work: Callable[[range], Block],
        *,
        what: str,
        progress: Progress = quiet,
        stage: str = "block",
    ) -> Iterator[Block]:
        """Yield the blocks of some rows in their order, each read or computed as by `block`.

        Args:
            rows: all of them, e.g. places of samples.
            size: rows per block; the last one may be shorter.
            work: computes the block of some of the rows.
            what: what the rows are, for the progress.
            progress: wraps the loop.
            stage: what it is a block of, where a run has several kinds.

        Raises:
            FanalError: as `block`.
        """
        parts = [rows[a : a + size] for a in range(0, len(rows), size)]
        for i in progress(range(len(parts)), what):
            yield self.block(i, lambda: work(parts[i]), stage=stage)  # noqa: B023

    def describe(self, record: Mapping[str, Any]) -> None:
        """Write `run.json`; the run can still be resumed afterwards.

        Args:
            record: what belongs there beside command, config and versions: seeds, network, seconds, results.

        Raises:
            FanalError: it cannot be written.
        """
        stamp = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "threads": torch.get_num_threads()}
        write_json(self.part / "run.json", {**self.head, **stamp, **record})

    def finish(self) -> Path:
        """Rename the folder into place and drop the block files.

        Raises:
            FanalError: something else is at `out` by now, or the folder cannot be renamed; the run stays whole.
        """
        self._check_target(self.overwrite)
        old = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.old", dir=self.out.parent))
        try:
            if self.out.exists():
                os.replace(self.out, old)
            try:
                os.replace(self.part, self.out)
            except OSError:
                if any(old.iterdir()):
                    os.replace(old, self.out)
                raise
        except OSError as error:
            where = f"cannot put the run in place at {self.out}: {error.strerror}"
            raise FanalError(f"{where}; it is whole in {self.part}") from error
        finally:
            shutil.rmtree(old, ignore_errors=True)
        for path in self.out.glob(_BLOCKS):
            path.unlink()
        return self.out


def _is_record(path: Path) -> bool:
    """Whether a file is the `run.json` of a finished run, so that nobody else's folder is ever replaced."""
    try:
        record = read_json(path) if path.is_file() else {}
    except FanalError:
        return False
    return {"command", "config", "versions"} <= record.keys()


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for key in new:
        if isinstance(new[key], Mapping) and isinstance(old.get(key), Mapping):
            inner = _first_difference(old[key], new[key])
            if inner:
                return inner
        elif old.get(key) != new[key]:
            return f"{key}: {old.get(key)!r} there, {new[key]!r} here"
    return ""
