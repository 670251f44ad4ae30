"""How close the exact denoiser of a data set comes to the two matrix products that it cannot do without.

python benchmarks/exact_speed.py --out benchmarks/results/exact_speed.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fanal.exact import Dataset


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(count: int, dim: int, batch: int, rounds: int) -> list[dict[str, float]]:
    """Median time of the raw products over that of the denoiser, by sigma; both alternate in one process."""
    generator = torch.Generator().manual_seed(0)
    rate = torch.arange(1, dim + 1) ** -0.5
    points = torch.randn(count, dim, generator=generator) * rate / rate.mean() / 2
    data, noise = Dataset(points), torch.randn(batch, dim, generator=generator)
    rows = []
    for sigma in (80.0, 2.0, 0.5, 0.05, 0.002):
        x, level = points[:batch] + sigma * noise, torch.tensor(sigma)
        raw, own = [], []
        for _ in range(rounds):
            raw.append(seconds(lambda x=x: (x @ points.T) @ points))
            own.append(seconds(lambda x=x, level=level: data(x, level)))
        exact = data(x[:8].double(), level)
        error = (data(x[:8], level).double() - exact).norm(dim=1) / exact.norm(dim=1)
        ratio = statistics.median(raw) / statistics.median(own)
        rows.append({"count": count, "dim": dim, "sigma": sigma, "ratio": ratio, "error": float(error.max())})
    return rows


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for count in (10_000, 50_000) for row in measure(count, 3072, args.batch, args.rounds)]
    for row in rows:
        print(f"{row['count']:6d} {row['sigma']:7.3f}  ratio {row['ratio']:.2f}  error {row['error']:.1e}")
    args.out.write_text(json.dumps({"torch": torch.__version__, "batch": args.batch, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
