"""How many samples per second do the generators and verifiers of fanal.datasets handle on one core?

Usage: OMP_NUM_THREADS=1 python benchmarks/verifier_speed.py [COUNT]

Prints the median of five runs. "noise" is white noise, the verifiers' worst case (hundreds of regions per image).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from fanal.datasets import get


def rate(work: Callable[[], object], count: int) -> float:
    work()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return count / statistics.median(seconds)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    torch.set_num_threads(1)
    print(f"{'set':10s} {'draw':>12s} {'verify real':>12s} {'verify noise':>12s}   samples/s, {count} samples")
    for name in ("grid2", "shapes32", "hands32", "scenes64"):
        dataset = get(name)
        real = dataset.data(count=count).x
        noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
        draw = rate(lambda d=dataset: d.data(count=count), count)
        good, bad = (rate(lambda d=dataset, x=x: d.verify(x), count) for x in (real, noise))
        print(f"{name:10s} {draw:12,.0f} {good:12,.0f} {bad:12,.0f}")


if __name__ == "__main__":
    main()
