"""Do solved densities agree with the statements of [PDE] sec. 2 and 3, within what their cells and steps allow?

    python benchmarks/theory_densities.py --out benchmarks/results/theory_densities.json --figures docs/images

prints the tables of docs/theory.md, keeps their figures and draws what each check compared; `--only` names checks.
About half a minute on one core.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console

from fanal.bench.schedule_tables import markdown
from fanal.errors import unknown_name
from fanal.files import write_json
from fanal.pde.theory import SHEETS, STATEMENTS, Finding
from fanal.report.sheets import row as drawn
from fanal.report.sheets import write_sheet
from fanal.runs import cpu_threads, versions

HEAD = ("[PDE]", "check", "what is measured", "error", "tolerance", "holds")


def row(name: str, found: Finding) -> list[str]:
    return [
        found.number,
        name,
        found.measured,
        f"{found.error:.2g}",
        f"{found.tolerance:.2g}",
        "yes" if found.holds else "NO",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="folder for theory-NAME.png, the sheets of figures")
    parser.add_argument("--only", nargs="*", default=list(STATEMENTS), help="names of checks")
    given = parser.parse_args()
    for name in given.only:
        if name not in STATEMENTS:
            raise SystemExit(str(unknown_name("check", name, STATEMENTS)))
    console, found, begin = Console(stderr=True), {}, time.perf_counter()
    with cpu_threads(1):
        for name in given.only:
            console.print(name)
            found[name] = STATEMENTS[name]()
    print(markdown(list(HEAD), [row(name, own) for name, own in found.items()]))
    more = [[name, key, f"{value:.4g}"] for name, own in found.items() for key, value in own.values.items()]
    print()
    print(markdown(["check", "also measured", "value"], more))
    for sheet, names in SHEETS.items() if given.figures else ():
        rows = [drawn(name, found[name]) for name in names if name in found]
        if rows:
            write_sheet(rows, given.figures / f"theory-{sheet}.png")
    if given.out:
        kept = {
            name: {"number": own.number, "says": own.says, "measured": own.measured, "error": float(own.error)}
            | {"tolerance": float(own.tolerance), "holds": own.holds, "values": own.values}
            for name, own in found.items()
        }
        write_json(given.out, {"statements": kept, "seconds": time.perf_counter() - begin, "versions": versions()})


if __name__ == "__main__":
    main()
