"""`evaluate`: compare samples with real ones, block by block, into a run folder."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fanal.errors import FanalError, unknown_name
from fanal.files import write_atomically
from fanal.metrics.captions import Captions, choose_captions, read_captions, write_captions
from fanal.metrics.clip import Clip, clip_score
from fanal.metrics.comparison import METRICS, cautions
from fanal.metrics.distances import Distance
from fanal.metrics.features import Extractor, OwnFeatures, extractor, is_image
from fanal.metrics.samples import Samples, open_samples
from fanal.metrics.statistics import Statistics, read_statistics, write_statistics
from fanal.processes import check_device
from fanal.runs import Progress, Run, cpu_threads, quiet
from fanal.summary import as_json

__all__ = ["EvalConfig", "evaluate"]

_REAL = "real.safetensors"
_STATISTICS = (".npz", ".safetensors")


_DEFAULT = ("fid", "kid", "pr", "dc")


@dataclass(frozen=True)
class EvalConfig:
    """What an evaluation depends on; written to `run.json`.

    Attributes:
        samples: what to judge, as `fanal.metrics.open_samples` takes it; None: only write statistics.
        real: what to compare with: the same, or a file of statistics; None: only CLIP.
        metrics: keys of `METRICS`, and "clip"; (): "fid", "kid", "pr", "dc" as far as `real` has what they need, and
            "clip" where captions are given.
        features: as `fanal.metrics.extractor` takes it; "auto": "own" for images, "pixels" for anything else.
        tensor: tensor of a run folder to judge; None: `image`, else `x`.
        split: part of a data set that is `real`.
        samples_split: part of a data set that is `samples`.
        count: number of samples; None: all.
        real_count: number of real ones; None: all.
        size: side of the square that the images of folders and zips are resized to.
        captions: file of captions.
        clip: folder or hub id of a CLIP.
        caption_seed: choose one caption per image, and as many as there are samples, with this seed; None: the file
            has exactly the samples' captions.
        seed: of directions and halves.
        block: samples whose features are computed together.
        write_stats: file for the statistics of `real`.
        moments_only: leave the features out of files of statistics.
        device: where networks run.
        threads: CPU threads.
    """

    samples: str | None = None
    real: str | None = None
    metrics: tuple[str, ...] = ()
    features: str = "auto"
    tensor: str | None = None
    split: str = "held out"
    samples_split: str = "train"
    count: int | None = None
    real_count: int | None = None
    size: int | None = None
    captions: str | None = None
    clip: str | None = None
    caption_seed: int | None = None
    seed: int = 0
    block: int = 128
    write_stats: str | None = None
    moments_only: bool = False
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.block < 1 or self.threads < 1:
            raise FanalError(f"block and threads must be at least 1, got {self.block} and {self.threads}")
        for name in self.metrics:
            if name not in METRICS and name != "clip":
                raise unknown_name("metric", name, [*METRICS, "clip"])
        if (self.captions is None) is not (self.clip is None):
            raise FanalError("CLIP scores need both: --captions FILE and --clip DIR")
        if self.captions is None and ("clip" in self.metrics or self.caption_seed is not None):
            raise FanalError("CLIP scores need --captions FILE and --clip DIR")
        self._check_sides()

    def _check_sides(self) -> None:
        if self.samples is None and (self.write_stats is None or self.metrics or self.clip):
            raise FanalError("there is nothing to judge: give a run folder or images (or --write-stats alone)")
        if self.real is None and (self.write_stats is not None or set(self.metrics) - {"clip"} or not self.clip):
            raise FanalError(
                "there is nothing to compare with: give --real, a data set, images or a file of statistics"
            )
        if self.write_stats is not None and Path(self.write_stats).suffix != ".safetensors":
            raise FanalError(f"--write-stats writes a .safetensors file, got {self.write_stats}")


@dataclass(frozen=True, eq=False)
class _Setup:
    """Everything that is read before the work begins."""

    config: EvalConfig
    names: tuple[str, ...]
    samples: Samples | None
    real: Samples | Statistics | None
    extract: Extractor | None
    clip: Clip | None
    captions: Captions | None


def _open_real(config: EvalConfig) -> Samples | Statistics | None:
    """The real side: statistics where a file holds them, else samples."""
    if config.real is None:
        return None
    path = Path(config.real)
    if path.suffix in _STATISTICS and (path.suffix == ".npz" or not _holds_samples(path)):
        if config.write_stats is not None:
            raise FanalError(f"{path} holds statistics already; --write-stats makes them from samples")
        if config.real_count is not None:
            raise FanalError(f"{path} holds statistics of a whole set: --real-count has no meaning there")
        return read_statistics(path)
    return open_samples(config.real, split=config.split, count=config.real_count, size=config.size)


def _holds_samples(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return "mean" not in file.keys()
    except (SafetensorError, OSError):
        return False  # read_statistics says what is wrong


def _names(config: EvalConfig, real: Samples | Statistics | None) -> tuple[str, ...]:
    """The figures to compute, in the order of `METRICS`."""
    wanted = set(config.metrics)
    if not wanted and config.samples is not None:
        wanted = {"clip"} if config.clip else set()
        if real is not None:
            bare = isinstance(real, Statistics) and real.features is None
            wanted |= {"fid"} if bare else set(_DEFAULT)
    return tuple(name for name in [*METRICS, "clip"] if name in wanted)


def _check_counts(setup: _Setup) -> None:
    """Refuse what cannot be computed before hours of features, not after."""
    sides: list[tuple[str, int | None]] = []
    if setup.samples is not None:
        sides.append(("samples", len(setup.samples)))
    if setup.real is not None:
        sides.append(("real samples", setup.real.n if isinstance(setup.real, Statistics) else len(setup.real)))
    bare = isinstance(setup.real, Statistics) and setup.real.features is None
    for name in setup.names:
        metric = METRICS.get(name)
        if metric is None:
            continue
        if metric.features and bare:
            raise FanalError(
                f"{name} needs real features, and {setup.config.real} holds only their mean and covariance"
            )
        for what, n in sides:
            if n is not None and n < metric.least:
                raise FanalError(f"{name} needs at least {metric.least} {what}, got {n}")


def _extractor(config: EvalConfig, samples: Samples | None, real: Samples | Statistics | None) -> Extractor | None:
    """The extractor, after it was tried on one sample of each side."""
    if real is None:
        return None
    sources = [side for side in (samples, real) if side is not None and not isinstance(side, Statistics)]
    first = [side.read(0, 1) for side in sources]
    spec = config.features
    if spec == "auto":
        spec = "own" if is_image(tuple(first[0].shape[1:])) else "pixels"
    found = extractor(spec, config.device)
    widths = [found(one).shape[1] for one in first]
    if isinstance(real, Statistics):
        if real.extractor and (found.name, found.sha256) != (real.extractor, real.sha256):
            raise FanalError(
                f"{config.real} was made with {real.label()}, and --features is {config.features}: statistics of "
                "different extractors cannot be compared"
            )
        widths.append(len(real.mean))
    if len(set(widths)) > 1:
        raise FanalError(
            f"features of different lengths cannot be compared: {widths[0]} of {config.samples} and {widths[-1]} of "
            f"{config.real}; give both the same size, or use --features own"
        )
    return found


def _captions(config: EvalConfig, samples: Samples | None) -> Captions | None:
    """One caption per sample, in the samples' order."""
    if config.captions is None or samples is None:
        return None
    found, n = read_captions(config.captions), len(samples)
    if config.caption_seed is not None:
        return choose_captions(found, n, config.caption_seed)
    if len(set(found.ids)) == len(found.ids) and samples.names and set(samples.names) <= set(found.ids):
        by_id = dict(zip(found.ids, found.texts, strict=True))
        return Captions(samples.names, tuple(by_id[name] for name in samples.names))
    if len(found.texts) != n:
        raise FanalError(
            f"{config.captions} holds {len(found.texts)} captions for {n} samples: give one per sample, in the "
            "samples' order or with their file names as ids; or --caption-seed, if they were made from that choice"
        )
    return found


def _prepare(config: EvalConfig) -> _Setup:
    check_device(config.device)
    samples = None
    if config.samples is not None:
        samples = open_samples(
            config.samples, tensor=config.tensor, split=config.samples_split, count=config.count, size=config.size
        )
    elif config.tensor is not None or config.count is not None:
        raise FanalError("--tensor and --count are for the samples, and none are given; real ones take --real-count")
    real = _open_real(config)
    captions = _captions(config, samples)
    clip = Clip(config.clip, config.device) if config.clip is not None else None
    extract = _extractor(config, samples, real)
    setup = _Setup(config, _names(config, real), samples, real, extract, clip, captions)
    _check_counts(setup)
    return setup


def _identity(setup: _Setup) -> dict[str, str]:
    """What decides the numbers beside the configuration."""
    result = {}
    for name, side in (("samples", setup.samples), ("real", setup.real)):
        if isinstance(side, Statistics):
            with open(str(setup.config.real), "rb") as file:
                result[name] = hashlib.file_digest(file, "sha256").hexdigest()
        elif side is not None:
            result[name] = side.identity
    if setup.extract is not None:
        result["features"] = f"{setup.extract.name} {setup.extract.sha256}".strip()
    if setup.clip is not None and setup.captions is not None:
        result["clip"] = setup.clip.sha256
        result["captions"] = hashlib.sha256(repr(setup.captions).encode()).hexdigest()
    return result


@dataclass(frozen=True)
class _Blocks:
    """How a tensor is computed block by block."""

    run: Run
    size: int
    progress: Progress

    def collect(self, n: int, stage: str, what: str, work: Callable[[range], Tensor]) -> Tensor:
        """Compute a tensor of n rows; what is stored already is read."""
        parts = self.run.blocks(
            range(n),
            self.size,
            lambda rows: ({"rows": work(rows)}, {}),
            what=what,
            progress=self.progress,
            stage=f"block-{stage}",
        )
        return torch.cat([tensors["rows"] for tensors, _ in parts])

    def statistics(self, source: Samples, extract: Extractor, stage: str, what: str) -> Statistics:
        """Extract features and their statistics."""
        found = self.collect(len(source), stage, what, lambda rows: extract(source.read(rows.start, rows.stop)).float())
        return Statistics.of(found, extract.name, extract.sha256)


def _compare(
    setup: _Setup, x: Statistics, real: Statistics, progress: Progress
) -> tuple[dict[str, Distance], dict[str, float]]:
    """Compute the figures, and the seconds that each took."""
    names, figures, seconds = [name for name in setup.names if name in METRICS], {}, {}
    for i in progress(range(len(names)), "comparing"):
        begin = time.perf_counter()
        figures |= METRICS[names[i]].measure(x, real, setup.config.seed)
        seconds[names[i]] = time.perf_counter() - begin
    return figures, seconds


def _about(setup: _Setup, real: Statistics | None) -> dict[str, Any]:
    """What was compared with what, by what."""
    result: dict[str, Any] = {}
    if setup.extract is not None and real is not None:
        result["features"] = {
            "name": setup.extract.name,
            "sha256": setup.extract.sha256,
            "per_sample": len(real.mean),
        }
    if setup.samples is not None:
        result["samples"] = setup.samples.about
    if isinstance(setup.real, Statistics):
        result["real"] = {"source": setup.config.real, "n": setup.real.n}
    elif setup.real is not None:
        result["real"] = setup.real.about
    if setup.clip is not None:
        result["clip"] = {"name": setup.clip.name, "sha256": setup.clip.sha256}
    return result


def _work(setup: _Setup, run: Run, progress: Progress) -> dict[str, Any]:
    """Do everything, write the tensors, and return the results."""
    config, blocks, begin = setup.config, _Blocks(run, setup.config.block, progress), time.perf_counter()
    extract, real, figures, warnings, seconds = setup.extract, None, {}, [], {}
    keep = not config.moments_only
    if extract is not None:
        side = setup.real
        real = side if isinstance(side, Statistics) else None
        if isinstance(side, Samples):
            real = blocks.statistics(side, extract, "real", "features of real samples")
    if extract is not None and real is not None and setup.samples is not None:
        x = blocks.statistics(setup.samples, extract, "samples", "features of samples")
        x.check_same(real)
        seconds["features"] = time.perf_counter() - begin
        figures, spent = _compare(setup, x, real, progress)
        seconds |= spent
        warnings = cautions(x, real, figures)
        if isinstance(extract, OwnFeatures) and setup.samples.read(0, 1).shape[1] == 3:
            warnings.append("the package's own features see images in gray, 32 by 32: color does not count")
        write_statistics(run.path("stats.safetensors"), x if keep else dataclasses.replace(x, features=None))
    scores = {}
    if setup.clip is not None and setup.captions is not None and setup.samples is not None:
        scores = _clip(setup.clip, setup.captions, setup.samples, blocks)
        write_captions(run.path("captions.tsv"), setup.captions)
    if config.write_stats is not None and real is not None:
        write_statistics(run.path(_REAL), real if keep else dataclasses.replace(real, features=None))
    found = {name: as_json(figure) for name, figure in figures.items()} | scores
    return _about(setup, real) | {"figures": found, "warnings": warnings, "seconds": seconds}


def _clip(clip: Clip, captions: Captions, samples: Samples, blocks: _Blocks) -> dict[str, Any]:
    def work(rows: range) -> Tensor:
        return clip(samples.read(rows.start, rows.stop), captions.texts[rows.start : rows.stop])

    return {"clip": as_json(clip_score(blocks.collect(len(samples), "clip", "CLIP", work)))}


def evaluate(
    config: EvalConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = quiet,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Compare samples with real ones, and images with their captions; each figure with its standard error.

    Features are computed in blocks and kept, so that a run that was stopped goes on.

    Args:
        config: what to do.
        out: the run folder.
        overwrite: replace what is there, and the file of `config.write_stats`.
        progress: wraps loops over blocks, given what they do.
        say: takes one line for the user.

    Returns:
        The run folder, holding `run.json`, `stats.safetensors` (the statistics of the samples), and `captions.tsv`
        where captions were used.

    Raises:
        FanalError: the configuration, a source, a network or the place does not work.
    """
    if config.write_stats is not None and Path(config.write_stats).exists() and not overwrite:
        raise FanalError(f"{config.write_stats} exists: choose another --write-stats, or pass --overwrite")
    with cpu_threads(config.threads):
        setup = _prepare(config)
        with Run(out, "eval", dataclasses.asdict(config), identity=_identity(setup), overwrite=overwrite) as run:
            if run.resumed:
                say(f"resuming: {run.resumed} blocks are there already")
            begin = time.perf_counter()
            results = _work(setup, run, progress)
            run.describe({"seconds": time.perf_counter() - begin, "results": results})
            place = run.finish()
            if config.write_stats is not None:  # last, so that a run that was stopped can go on
                write_atomically(Path(config.write_stats), lambda part: shutil.copyfile(place / _REAL, part))
                (place / _REAL).unlink()
            return place
