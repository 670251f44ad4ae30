"""How far are the points between two noise vectors from noise, method by method, weight by weight, and against d?

[GEO] table 2 and fig. 11, measured, each beside its law: the variance, Kolmogorov's distance between the law of the
squared length and the one that noise has, and what becomes of the length of ends that share it.

    python benchmarks/interpolation.py --count 2000 --out interpolation.json

draws the same beside the JSON file, as interpolation.html.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fanal.bench.plots import Line, Panel, write_plots
from fanal.files import write_json
from fanal.interpolation import METHODS, Shift, expected_distance, expected_length, measure_shift
from fanal.runs import versions

DIMENSIONS = (2, 3, 4, 8, 16, 64, 256, 784, 3072)
WEIGHTS = (0.1, 0.25, 0.5)


def row(found: Shift) -> list[str]:
    """One line of the table."""
    measured = found.variance.plain(3) if math.isfinite(found.expected) else "–"
    return [
        found.method,
        f"{found.weight:g}",
        str(found.d),
        f"{found.expected:.4f}".replace("inf", "infinite"),
        measured,
        f"{expected_distance(found.method, found.weight, found.d):.3f}",
        f"{found.distance:.3f}",
        "{:.3f}, {:.3f}".format(*expected_length(found.method, found.weight, found.d)),
        f"{found.length.value:.3f}, {found.length_error:.3f}",
    ]


def panels(found: list[Shift]) -> list[Panel]:
    """The variance against the weight for each d (fig. 11), and both shifts against d."""
    out = []
    for method in METHODS:
        own = [shift for shift in found if shift.method == method]
        lines = []
        for d in dict.fromkeys(shift.d for shift in own):
            here = [shift for shift in own if shift.d == d and math.isfinite(shift.expected)]
            if here:
                values = [s.variance.value for s in here], [s.variance.se for s in here]
                lines.append(Line(f"d = {d}", [s.weight for s in here], *values))
        out.append(Panel(f"{method}: variance of the point", lines, "weight", "variance", log=False))
    for name, read in (("distance", lambda s: s.distance), ("length error", lambda s: s.length_error)):
        lines = []
        for method in METHODS:
            here = [s for s in found if s.method == method and s.weight == 0.5]
            lines.append(Line(method, [math.log10(s.d) for s in here], [read(s) for s in here], [None] * len(here)))
        out.append(Panel(f"halfway: {name}", lines, "log10 d", name, log=False))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=int, nargs="+", default=list(DIMENSIONS))
    parser.add_argument("--weights", type=float, nargs="+", default=list(WEIGHTS))
    parser.add_argument("--count", type=int, default=2000, help="pairs of noise vectors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("interpolation.json"))
    options = parser.parse_args()
    found = [
        measure_shift(method, d, weight=weight, count=options.count, seed=options.seed)
        for method in METHODS
        for weight in options.weights
        for d in options.dimensions
    ]
    title = f"{options.count} pairs, distance by chance below {found[0].chance:.3f} (99 %)"
    table = Table(title=title)
    head = ("method", "weight", "d", "variance, law", "measured", "distance, law", "measured")
    for column in (*head, "length and its error, law", "measured"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for shift in found:
        table.add_row(*row(shift))
    Console(width=140).print(table)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    content = {"settings": settings, "versions": versions(), "shifts": [dataclasses.asdict(s) for s in found]}
    # An infinite variance is no JSON number.
    write_json(options.out, json.loads(json.dumps(content), parse_constant=lambda _: None))
    write_plots(options.out.with_suffix(".html"), "Between two noise vectors", panels(found))


if __name__ == "__main__":
    main()
