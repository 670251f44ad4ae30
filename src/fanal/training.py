"""Training: a recipe and a folder in, a model folder out, through any number of interruptions.

Every random draw is a function of (seed, iteration, place in the batch), and a checkpoint holds everything else, so
that a run that was killed and resumed ends with the same bits as one that was not (on one machine). Several processes,
started by `torchrun` or `accelerate launch`, share each batch; the first of them writes.
"""

from __future__ import annotations

import io
import json
import math
import platform
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import fanal
from fanal.curves import curve
from fanal.datasets import Dataset, Folder, get
from fanal.errors import FanalError, reason
from fanal.files import read_tensors, write_atomically, write_tensors
from fanal.nets.folder import read_card, save_model
from fanal.nets.preconditioning import Preconditioned
from fanal.optimization import Score, TrainingState, bind
from fanal.processes import join
from fanal.progress import training_bar
from fanal.recipes import Recipe as Recipe
from fanal.runs import cpu_threads
from fanal.seeding import noise

__all__ = ["Recipe", "previous", "train"]

_CHECKPOINT = "checkpoint.safetensors"
_LOG, _CURVE = "log.jsonl", "curve.png"
_FILES = ("model.json", "model.safetensors", _CHECKPOINT, _LOG, _CURVE)
_LOG_EVERY = 100
_AVERAGES = "ema"  # folder of the averages beside the model
_AVERAGE_NAME = re.compile(r"(exponential|power)-[0-9.e-]+")
_NAMED = 20  # skipped images that a card names
_TWICE = 1.0  # seconds within which a launcher passes one Ctrl-C on a second time


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    dataset: Dataset | None = None,
    score: Score | None = None,
    progress: bool = True,
    checkpoint_every: int = 500,
    validate_every: int = 500,
    sample_every: int = 1000,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
) -> Preconditioned:
    """Train a model, or go on with an interrupted run, and write it as a model folder.

    While it runs, `out` holds `checkpoint.safetensors`, `log.jsonl`, `curve.png` and `samples/*.png`; at the end the
    checkpoint makes way for `model.safetensors` and `model.json`, and further averages of the weights become model
    folders `ema/NAME`. Ctrl-C writes a checkpoint before it stops the run.

    Args:
        recipe: what to train.
        out: folder of the run; a checkpoint in it is continued.
        dataset: used instead of `fanal.datasets.get(recipe.data)`.
        score: the true score ∇ log p(x; sigma), for the objective "esm".
        progress: whether to show a progress bar with the time left; without a terminal, a line a minute.
        checkpoint_every: iterations between checkpoints.
        validate_every: iterations between held-out losses.
        sample_every: iterations between pictures of samples, of images and points of the plane; 0 for none.
        device: where to train.
        overwrite: whether to start over in a folder that holds a finished model or an unfinished training.

    Returns:
        The model with averaged weights, in evaluation mode.

    Raises:
        FanalError: the recipe does not fit the data or the device, the folder holds a finished model or another
            recipe's checkpoint, or it cannot be written.
        NonFiniteError: the loss became NaN or infinite.
    """
    if checkpoint_every < 1 or validate_every < 1 or sample_every < 0:
        raise FanalError(
            "checkpoint_every and validate_every must be at least 1 and sample_every at least 0, "
            f"got {checkpoint_every}, {validate_every} and {sample_every}"
        )
    processes, folder = join(device), Path(out)
    processes.agree(lambda: _prepare(folder, overwrite))
    place = processes.device
    rng = torch.random.fork_rng(devices=[place] if place.type == "cuda" else [])
    with rng, _deferred_interrupt() as stop, cpu_threads(recipe.threads):
        samples = dataset or get(recipe.data)
        run = TrainingState.start(recipe, samples, score, processes)
        sitting = _Sitting(run, folder, _skipped(samples), samples.classes)
        sitting.restore()
        with training_bar(recipe, sitting.run.iteration, progress and processes.main) as advance:
            while sitting.run.iteration < recipe.iterations:
                advance(sitting.run.step(stop.is_set))
                sitting.record(validate_every, sample_every)
                if sitting.run.halted or sitting.due(checkpoint_every):
                    sitting.checkpoint()
                if sitting.run.halted:
                    raise KeyboardInterrupt
        processes.agree(sitting.finish)
    return sitting.run.averaged


def previous(out: str | Path) -> Recipe | None:
    """Return the recipe of the finished or unfinished training in a folder, if there is one that can be read."""
    folder = Path(out)
    try:
        if (folder / "model.json").is_file():
            return Recipe.from_dict(read_card(folder)["recipe"])
        if (folder / _CHECKPOINT).is_file():
            return Recipe.from_dict(json.loads(read_tensors(folder / _CHECKPOINT)[1]["fanal"])["recipe"])
    except (FanalError, KeyError, TypeError, ValueError):
        pass  # training says what is wrong with it
    return None


@dataclass(eq=False)
class _Sitting:
    """A run, the folder it writes to, and what it took: one process's share of a training."""

    run: TrainingState
    folder: Path
    skipped: Sequence[str] = ()
    classes: Sequence[str] = ()
    seconds: float = 0.0  # of the sittings before this one
    began: float = field(default_factory=time.perf_counter)
    held_out: dict[str, Any] = field(default_factory=dict)

    def due(self, every: int) -> bool:
        """Return whether something that happens every so many iterations, and at the end, happens now."""
        return self.run.iteration % every == 0 or self.run.iteration == self.run.recipe.iterations

    def elapsed(self) -> float:
        """Return the seconds spent so far, over all sittings."""
        return self.seconds + time.perf_counter() - self.began

    def record(self, validate_every: int, sample_every: int) -> None:
        """Append to the log and draw samples, where it is time to."""
        run = self.run
        if not run.processes.main:
            return
        if self.due(_LOG_EVERY) or self.due(validate_every):
            recent = run.losses[-_LOG_EVERY:]
            entry: dict[str, Any] = {"iteration": run.iteration, "loss": sum(recent) / len(recent)}
            if self.due(validate_every):
                self.held_out = entry["held_out"] = run.held_out_loss()
            entry |= {"seconds": round(self.elapsed(), 3), "learning_rate": run.recipe.rate(run.iteration - 1)}
            try:
                with (self.folder / _LOG).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise FanalError(f"cannot write {self.folder / _LOG}: {reason(error)}") from error
        drawable = len(run.model.shape) == 3 or run.model.shape == (2,)
        if sample_every and drawable and self.due(sample_every):
            _picture(run.averaged, self.folder / "samples" / f"{run.iteration:07d}.png")

    def checkpoint(self) -> None:
        """Write everything needed to go on from here, and draw the curve so far."""
        run = self.run
        if not run.processes.main:
            return
        header = {"iteration": run.iteration, "seconds": self.elapsed(), "recipe": run.recipe.to_dict()}
        header |= {"data": run.fingerprint(), "scaler": run.scaler.state_dict()}
        tensors = dict(run.tensors()) | {"losses": torch.tensor(run.losses, dtype=torch.float64)}
        write_tensors(self.folder / _CHECKPOINT, tensors, {"fanal": json.dumps(header)})
        _save_picture(curve(list(_lines(self.folder / _LOG))), self.folder / _CURVE)

    def restore(self) -> None:
        """Go on from the folder's checkpoint, if there is one, and cut the log back to it."""
        path, run = self.folder / _CHECKPOINT, self.run
        if path.exists():
            stored, header = _read_checkpoint(path, run.recipe)
            if header.get("data") != run.fingerprint():
                raise FanalError(
                    f"{path} was trained on other samples of {run.recipe.data!r} than there are now: bring them back, "
                    "or start over with --overwrite"
                )
            self.seconds = header["seconds"]
            run.restore(stored, header["iteration"], header.get("scaler"))
        kept = [line for line in _lines(self.folder / _LOG) if line.get("iteration", math.inf) <= run.iteration]
        for line in kept:
            self.held_out = line.get("held_out", self.held_out)
        if run.processes.main:
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(self.folder / _LOG, lambda part: _fill(part, text.encode()))

    def finish(self) -> None:
        """Write the model folders, the model itself last, and remove the checkpoint."""
        run, card = self.run, self.card()
        if len(run.averages) > 1:
            places = [".", *(f"{_AVERAGES}/{profile.name}" for profile in run.recipe.averages[1:])]
            losses = [card["held_out_loss"], *(run.held_out_loss(average) for average in run.averages[1:])]
            card["averages"] = {
                profile.name: {"folder": place, "held_out_loss": loss.get("mean")}
                for profile, place, loss in zip(run.recipe.averages, places, losses, strict=True)
            }
            for average, place, loss in zip(run.averages[1:], places[1:], losses[1:], strict=True):
                save_model(self.folder / place, average, card | {"held_out_loss": loss, "average": Path(place).name})
        save_model(self.folder, run.averaged, card)
        (self.folder / _CHECKPOINT).unlink(missing_ok=True)

    def card(self) -> dict[str, Any]:
        """Return what a user of the model should know about its making."""
        run = self.run
        first, last = run.losses[:200], run.losses[-200:]
        return {
            "recipe": run.recipe.to_dict(),
            "seed": run.recipe.seed,
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "iterations": run.iteration,
            "seconds": round(self.elapsed(), 3),
            "loss": {"first_200": sum(first) / len(first), "last_200": sum(last) / len(last)},
            "held_out_loss": self.held_out or run.held_out_loss(),
            "device": run.processes.device.type,
            **({"processes": run.processes.count} if run.processes.count > 1 else {}),
            **({"skipped": {"count": len(self.skipped), "named": self.skipped[:_NAMED]}} if self.skipped else {}),
            **({"class_names": list(self.classes)} if run.recipe.conditional else {}),
            "threads": torch.get_num_threads(),
            "versions": {
                "fanal": fanal.__version__,
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("torch", "numpy")},
            },
        }


def _skipped(dataset: Dataset) -> list[str]:
    """The images that a folder left out, each with the reason."""
    return [f"{bad.name} {bad.reason}" for bad in dataset.skipped] if isinstance(dataset, Folder) else []


def _prepare(folder: Path, overwrite: bool) -> None:
    """Make the folder; refuse a finished or a foreign one, or remove what training wrote, and nothing else."""
    ours = tuple(folder / name for name in _FILES)
    if ours[0].exists():
        if not overwrite:
            raise FanalError(f"{folder} holds a finished model: choose another folder, or overwrite it")
        read_card(folder)  # refuses a model.json that is not fanal's
    elif folder.is_dir() and any(folder.iterdir()) and not any(path.exists() for path in ours[2:]):
        raise FanalError(f"{folder} holds other files and no training: choose an empty or new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            _clear(folder)
        for path in ours:  # of a run that was killed while it wrote
            for part in folder.glob(f".{path.name}.part[0-9]*"):
                part.unlink()
    except OSError as error:
        raise FanalError(f"cannot use {folder} for training: {reason(error)}") from error


def _clear(folder: Path) -> None:
    """Remove what a training wrote; model.json first: no longer a model."""
    written = [folder / name for name in _FILES]
    written += (folder / "samples").glob("[0-9]" * 7 + ".png")
    for place in (folder / _AVERAGES).glob("*"):
        if _AVERAGE_NAME.fullmatch(place.name):
            written += [place / name for name in _FILES[:2]]
    for path in written:
        path.unlink(missing_ok=True)


def _read_checkpoint(path: Path, recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint and make sure that it is this recipe's."""
    tensors, header = read_tensors(path)
    try:
        state = json.loads(header["fanal"])
        theirs, iteration, seconds = state["recipe"], state["iteration"], state["seconds"]
    except (KeyError, TypeError, ValueError) as error:
        raise FanalError(f"{path} is not a training checkpoint: remove it to start over") from error
    if type(iteration) is not int or not isinstance(seconds, float) or not isinstance(theirs, dict):
        raise FanalError(f"{path} is not a training checkpoint: remove it to start over")
    mine = json.loads(json.dumps(recipe.to_dict()))
    changes = [
        f"{key} was {theirs.get(key)!r}, is {mine.get(key)!r}"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]
    if changes:
        raise FanalError(
            f"{path} belongs to another recipe: {'; '.join(changes)}. Continue with that one, use another folder, or "
            "start over with --overwrite"
        )
    return tensors, state


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole entries of a log; a kill may have cut the last line short."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def _fill(part: Path, content: bytes) -> None:
    part.write_bytes(content)


def _picture(model: Preconditioned, path: Path, count: int = 16) -> None:
    """Draw samples, always from the same noise, and save them as one picture."""
    from fanal import pictures, schedules
    from fanal.sampling import sample
    from fanal.solvers import Heun

    device = next(model.parameters()).device
    start = noise(model.shape, range(count), model.sigma_max, device=device)
    labels = torch.arange(count) % model.classes if model.classes else None
    grid = schedules.polynomial(18, model.sigma_min or 0.002, model.sigma_max)
    _save_picture(pictures.grid(sample(bind(model, labels), start, grid, Heun()).cpu()), path)


def _save_picture(picture: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, lambda part: _fill(part, buffer.getvalue()))


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that a step is never cut in two; a later one stops at once."""
    event, since = threading.Event(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if not event.is_set():
            since = time.monotonic()
            event.set()
        elif time.monotonic() - since > _TWICE:
            signal.signal(signal.SIGINT, previous)
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
