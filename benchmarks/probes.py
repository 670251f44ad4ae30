"""Fit the linear probes that come with fanal, on calibration seeds, and write them into the package.

    python benchmarks/probes.py                        # hands32 and shapes32, 4,096 samples each, about 5 minutes
    python benchmarks/probes.py hands32 --count 1024 --out /tmp

The plain run (Euler, 40 steps, Karras' grid) makes the samples, the rule of the data labels them, and the
cross-validated AUC is printed. The report seeds of the benchmark take no part.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import fanal
from fanal.datasets import DATASETS
from fanal.hallucination.calibration import FIRST_SEED
from fanal.hallucination.probe import SHIPPED, fit, write
from fanal.schedules import polynomial
from fanal.seeding import noise

STRENGTH = {"hands32": 0.01, "shapes32": 0.05}


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(STRENGTH))
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in chosen.models:
        model, sigmas, parts = fanal.load(name), polynomial(40), []
        seeds = range(FIRST_SEED, FIRST_SEED + chosen.count)
        for i in range(0, chosen.count, 128):
            some = seeds[i : i + 128]
            parts.append(fanal.sample(model, noise(model.shape, some, 80.0), sigmas, fanal.solvers.Euler()))
        x = torch.cat(parts)
        wrong = DATASETS[name.partition("-")[0]].verify(x) != 0
        found = fit(model, x, wrong, strength=STRENGTH.get(name, 0.01))
        about = (
            f"{name}: {chosen.count} samples of Euler-40 from seed 2^40, {int(wrong.sum())} wrong; cross-validated AUC "
            f"{found.auc.plain(4)}; benchmarks/probes.py"
        )
        write(chosen.out / f"{name}.safetensors", found.probe, about)
        print(about, flush=True)


if __name__ == "__main__":
    main()
