"""`guard`: flag and repair the samples of any model; watch the seeds of an earlier run again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fanal.calibration_files import read_calibration, write_calibration
from fanal.errors import FanalError
from fanal.files import read_tensors
from fanal.flagging import first_samples
from fanal.generation import generate
from fanal.loading import fingerprint
from fanal.preparation import SampleConfig, record_of
from fanal.runs import Progress, quiet

__all__ = ["guard"]


def guard(
    config: SampleConfig,
    out: str | Path,
    *,
    run: str | Path | None = None,
    save: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = quiet,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Sample a model while a detector watches, flag by a threshold that is its own, and repair; as `generate`.

    Args:
        config: what to do; its `guard` says which repairs, `("none",)` flags only.
        out: the run folder.
        run: an earlier run whose samples these are, to be compared with.
        save: where the calibration is written too, for other runs to use.
        overwrite: replace what is there.
        progress: wraps loops over blocks, given what they do.
        say: takes one line for the user.

    Returns:
        The run folder, as `fanal.generation.generate` leaves it.

    Raises:
        FanalError: the configuration, the model or the place does not work, or the earlier run is of another model.
    """
    if not config.guard:
        raise FanalError(
            'a guard needs to know what to do with flagged samples: redo, renoise, fresh, ladder or ("none",)'
        )
    if run is not None:
        _check_model(Path(run), config.model)
    folder = generate(config, out, command="guard", overwrite=overwrite, progress=progress, say=say)
    if run is not None:
        say(_compared(Path(run), folder))
    if save is not None:
        write_calibration(save, read_calibration(folder))
        say(f"calibration: {save}")
    return folder


def _check_model(run: Path, model: str) -> None:
    record = record_of(run)
    was, now = record.get("identity", {}).get("model"), fingerprint(model)
    if was != now or (not now and record["config"].get("model") != model):
        raise FanalError(
            f"{run} was sampled from {record['config'].get('model')}, and {model} is not that model as it was then"
        )


def _compared(run: Path, folder: Path) -> str:
    """Whether the samples came out as in the earlier run."""
    then, now = (first_samples(read_tensors(place / "samples.safetensors")[0]) for place in (run, folder))
    if then.shape != now.shape:
        return f"{run} has {len(then)} samples, {len(now)} were watched"
    if torch.equal(then, now):
        return f"the samples are those of {run}, bit for bit"
    return f"the samples differ from those of {run} by at most {float((then - now).abs().max()):.3g}: other hardware?"
