"""How far are the points between two noise vectors from noise, method by method and dimension by dimension?

[GEO] table 2 and fig. 11, measured: the variance against its law, Kolmogorov's distance between the law of the squared
length and the one that noise has, and what becomes of the length of ends that share it.

    python benchmarks/interpolation.py --count 2000 --out interpolation.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fanal.files import write_json
from fanal.interpolation import METHODS, Shift, measure_shift
from fanal.runs import versions

DIMENSIONS = (2, 3, 4, 8, 16, 64, 256, 784, 3072)


def row(found: Shift) -> list[str]:
    """One line of the table."""
    measured = found.variance.plain(3) if math.isfinite(found.expected) else "–"
    return [
        found.method,
        str(found.d),
        f"{found.expected:.4f}".replace("inf", "infinite"),
        measured,
        f"{found.distance:.3f}",
        f"{found.length.value:.3f}",
        f"{found.length_error:.3f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=int, nargs="+", default=list(DIMENSIONS))
    parser.add_argument("--weight", type=float, default=0.5)
    parser.add_argument("--count", type=int, default=2000, help="pairs of noise vectors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("interpolation.json"))
    options = parser.parse_args()
    found = [
        measure_shift(method, d, weight=options.weight, count=options.count, seed=options.seed)
        for method in METHODS
        for d in options.dimensions
    ]
    title = f"weight {options.weight:g}, {options.count} pairs, distance by chance below {found[0].chance:.3f} (99 %)"
    table = Table(title=title)
    for column in ("method", "d", "variance, law", "measured", "distance", "length", "length error"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for shift in found:
        table.add_row(*row(shift))
    Console(width=120).print(table)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    content = {"settings": settings, "versions": versions(), "shifts": [dataclasses.asdict(s) for s in found]}
    # An infinite variance is no JSON number.
    write_json(options.out, json.loads(json.dumps(content), parse_constant=lambda _: None))


if __name__ == "__main__":
    main()
