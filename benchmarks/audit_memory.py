"""Memory and time of an audit of 10,000 samples against 50,000 training images of 32x32x3, by the command itself.

python benchmarks/audit_memory.py --out benchmarks/results/audit_memory.json

The images lie in a numpy file, as bytes; the model is a Gaussian fitted to them, so that the cost is the audit's own.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch


def write_images(path: Path, count: int, side: int) -> None:
    """Write smooth color images with a grain, as bytes, block by block."""
    generator = torch.Generator().manual_seed(0)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, 3, side, side))
    for start in range(0, count, 1000):
        rows = min(1000, count - start)
        coarse = torch.randn(rows, 3, side // 4, side // 4, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
        grain = 0.1 * torch.randn(rows, 3, side, side, generator=generator)
        out[start : start + rows] = (127.5 + 60 * (smooth + grain)).round().clamp(0, 255).byte().numpy()
    out.flush()


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--held", type=int, default=10_000)
    parser.add_argument("--traced", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--side", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        file, run = Path(place) / "images.npy", Path(place) / "run"
        write_images(file, args.train * 5 // 4, args.side)  # a fifth is held out
        words = ["audit", f"gaussian:{file},count=2000,rank=64", "--data", f"array:{file}", "--out", str(run)]
        for name in ("count", "held", "traced", "steps"):
            words += [f"--{name}", str(getattr(args, name))]
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fanal.cli", *words], check=True)
        wall, used = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        files = {path.name: path.stat().st_size for path in sorted(run.iterdir())}
    peak = used.ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)  # kilobytes, on macOS bytes
    found = {
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "points": record["results"]["points"],
        "held": record["results"]["copies"]["held"],
        "peak GiB": peak,
        "CPU seconds": used.ru_utime + used.ru_stime,
        "wall seconds": wall,
        "stages": record["stages"],
        "copies": record["results"]["copies"],
        "bytes": files,
        "versions": record["versions"],
        "machine": platform.machine(),
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"peak {peak:.2f} GiB, {found['CPU seconds']:.0f} CPU seconds, {wall:.0f} s: {record['stages']}")


if __name__ == "__main__":
    main()
