"""Noise as a pure function of a sample's seed, so that it never depends on batch size, order or rank."""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fanal.errors import FanalError

__all__ = ["SEED_STRIDE", "check_seeds", "noise", "run_seeds"]

SEED_STRIDE = 1_000_000
"""`--seed k` gives sample b the seed k·SEED_STRIDE + b, so that runs with different seeds share no noise."""

_STEP_BITS, _ROUND_BITS = 20, 12
_MOST = 2**40  # seeds from here on belong to calibration and tuning


def run_seeds(seed: int, count: int) -> range:
    """Return the seeds of a run's samples, `seed·SEED_STRIDE + b`.

    Args:
        seed: run seed, as `--seed`.
        count: number of samples.

    Raises:
        FanalError: the count is not in [1, SEED_STRIDE], or the run seed not in [0, 2^40/SEED_STRIDE).
    """
    if not 1 <= count <= SEED_STRIDE:
        raise FanalError(f"count must be in [1, {SEED_STRIDE}], got {count}")
    if not 0 <= seed < _MOST // SEED_STRIDE:
        raise FanalError(f"seed must be in [0, {_MOST // SEED_STRIDE}), got {seed}")
    return range(seed * SEED_STRIDE, seed * SEED_STRIDE + count)


def check_seeds(seeds: Iterable[int], count: int | None = None) -> tuple[int, ...]:
    """Return `seeds` as a tuple of whole numbers in [0, 2^64), one per sample.

    Raises:
        FanalError: a seed is not a whole number in range, or their number is not `count`.
    """
    try:
        result = tuple(operator.index(seed) for seed in seeds)
    except TypeError as error:
        raise FanalError(f"seeds must be whole numbers in [0, 2^64): {error}") from error
    wrong = [seed for seed in result if not 0 <= seed < 2**64]
    if wrong:
        raise FanalError(f"seeds must be whole numbers in [0, 2^64), got {wrong[0]}")
    if count is not None and len(result) != count:
        raise FanalError(f"one seed per sample: got {len(result)} seeds for a batch of {count}")
    return result


def noise(
    shape: Sequence[int],
    seeds: Iterable[int],
    sigma: float | Tensor = 1.0,
    *,
    step: int = 0,
    round: int = 0,
    stream: str = "start",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "b *d"]:
    """Gaussian noise `sigma·n`, n ~ N(0, I), one independent sample per seed.

    Sample b is a function of `(seeds[b], step, round, stream)` alone: a counter-based generator (Philox) is keyed
    with them, so no two keys share a stream. Values are drawn in float64 on the CPU and then rounded to `dtype`:
    float32 and float64 runs, and runs on any device, see the same noise.

    Args:
        shape: shape of one sample, without the batch axis.
        seeds: one whole number in [0, 2^64) per sample.
        sigma: standard deviation; a number, or one per sample with shape (B,). Infinity gives unit noise, which is
            where a run from infinite sigma starts (`fanal.sampling.depart`).
        step: index of the sampling step that draws (< 2^20).
        round: index of the repair round that draws (< 2^12).
        stream: name of the purpose, so that two parts of one step do not share noise.
        dtype: floating type of the result.
        device: where the result lives.

    Raises:
        FanalError: a seed, `step` or `round` is out of range.
    """
    keys = check_seeds(seeds)
    if not 0 <= step < 2**_STEP_BITS or not 0 <= round < 2**_ROUND_BITS:
        raise FanalError(f"step must be in [0, 2^{_STEP_BITS}) and round in [0, 2^{_ROUND_BITS}), got {step}, {round}")
    purpose = (zlib.crc32(stream.encode()) << 32) | (step << _ROUND_BITS) | round
    out = np.empty((len(keys), *shape))
    for b, seed in enumerate(keys):
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64)))
        out[b] = generator.standard_normal(tuple(shape))
    result = torch.from_numpy(out)
    if isinstance(sigma, Tensor) and sigma.ndim == 1:
        if len(sigma) != len(keys):
            raise FanalError(f"one sigma per sample: got {len(sigma)} sigmas for {len(keys)} seeds")
        sigma = sigma.detach().cpu().double().reshape(-1, *[1] * len(shape))
    elif float(sigma) == math.inf:
        sigma = 1.0
    elif isinstance(sigma, Tensor):
        sigma = float(sigma)
    return (sigma * result).to(dtype).to(device)
