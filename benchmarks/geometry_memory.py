"""Peak memory of `fanal geometry` at rising numbers of trajectories, by the command itself, each in its own process.

python benchmarks/geometry_memory.py --out benchmarks/results/geometry_memory.json

The model is a closed form that costs next to nothing, so that memory and time are the command's own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def watch(part: Path, stop: threading.Event, seen: dict[str, int]) -> None:
    """Keep the largest size of an unfinished run's folder, and of one of its blocks."""
    while not stop.wait(0.5):
        try:
            sizes = {path.name: path.stat().st_size for path in part.iterdir()}
        except OSError:  # not begun, or a file that was being renamed
            continue
        seen["folder"] = max(seen["folder"], sum(sizes.values()))
        seen["block"] = max([seen["block"], *(size for name, size in sizes.items() if name.startswith("block-"))])


def measure(args: argparse.Namespace, count: int) -> dict[str, Any]:
    """Run the command once."""
    with tempfile.TemporaryDirectory() as place:
        run, stop, seen = Path(place) / "run", threading.Event(), {"folder": 0, "block": 0}
        words = ["geometry", args.model, "--count", str(count), "--steps", str(args.steps), "--out", str(run)]
        words += ["--block", str(args.block)]
        watcher = threading.Thread(target=watch, args=(run.with_name(".run.part"), stop, seen))
        watcher.start()
        begin = time.perf_counter()
        child = subprocess.Popen([sys.executable, "-m", "fanal.cli", *words], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)  # of this child alone
        wall = time.perf_counter() - begin
        stop.set()
        watcher.join()
        if status:
            raise SystemExit(f"fanal {' '.join(words)} failed")
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        kept = {path.name: path.stat().st_size for path in sorted(run.iterdir())}
    return {
        "count": count,
        "peak MiB": used.ru_maxrss / (2**10 if sys.platform != "darwin" else 2**20),  # kilobytes, on macOS bytes
        "CPU seconds": used.ru_utime + used.ru_stime,
        "wall seconds": wall,
        "evaluations": record["network"]["evaluations"],
        "largest block file": seen["block"],
        "unfinished folder": seen["folder"],
        "bytes": kept,
        "versions": record["versions"],
    }


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="mixture:grid2")
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 2000, 8000, 50_000])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--block", type=int, default=32)
    args = parser.parse_args()
    rows = []
    for count in args.counts:
        rows.append(measure(args, count))
        print({key: value for key, value in rows[-1].items() if key not in ("bytes", "versions")}, flush=True)
    found = {
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "machine": platform.machine(),
        "versions": rows[-1]["versions"],
        "rows": [{key: value for key, value in row.items() if key != "versions"} for row in rows],
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
