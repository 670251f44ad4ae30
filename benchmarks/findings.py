"""Which observations about trajectories hold on small data? Measures the findings page's models and prints its tables.

Each run is a folder of `fanal geometry` (the script prints its command), is resumed where it was stopped, and is not
repeated once it is there. Its tables come from the folders alone; a minute's worth is computed beside them.

    python benchmarks/findings.py --out findings
    python benchmarks/findings.py --out findings --tables       # of the runs that are there
    python benchmarks/findings.py --out findings --computed     # what needs no run
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import findings_exact
import torch
from findings_networks import LEVELS, noised_images, train_networks
from findings_tables import CODES, FITS, tables
from findings_told import Told
from torch import Tensor

from fanal.encoding import EncodeConfig, encode_run
from fanal.geometry.command import GeometryConfig, geometry

SEED, COUNT, DRAWN, ENCODED = 5, 128, 48, 32
NETWORKS = "networks"


def runs(out: Path) -> dict[str, GeometryConfig]:
    """Return the runs by name, in the order in which they can be made: the last ones compare with those before."""
    own: dict[str, dict[str, Any]] = {
        "mixture-grid2": {"model": "mixture:grid2"},
        "grid2": {"model": "grid2", "data": "grid2"},
        "gaussian-digits8": {"model": "gaussian:digits8"},
        "mixture-digits8": {"model": "mixture:digits8"},
        "data-digits8": {"model": "data:digits8", "data": "digits8"},
        "digits8": {"model": "digits8", "data": "digits8"},
        **{f"ddpmpp-{kind}": {"model": str(out / NETWORKS / f"ddpmpp-{kind}"), "data": "digits8"} for kind in LEVELS},
        "digits8-noised": {"model": "digits8", "data": "digits8", "noise": str(out / "noised.safetensors")},
        "digits8-classes": {"model": "digits8", "label": "each", "count": 100, "drawn": 100},
        "gaussian-hands32": {"model": "gaussian:hands32"},
        "gaussian-shapes32": {"model": "gaussian:shapes32"},
        "mixture-shapes32": {"model": "mixture:shapes32"},
        "data-hands32": {"model": "data:hands32,count=2000", "data": "hands32", "count": 48},
        "shapes32": {"model": "shapes32", "data": "shapes32"},
        "hands32-images": {
            "model": "hands32",
            "data": "hands32",
            "count": ENCODED,
            "noise": str(out / "codes" / "noise.safetensors"),
        },
    }
    against = ("shapes32", "digits8", "grid2", "gaussian-hands32", "gaussian-digits8", "data-hands32", "hands32-images")
    own["hands32"] = {"model": "hands32", "data": "hands32", "against": tuple(str(out / name) for name in against)}
    found = {}
    for name, given in own.items():
        count = int(given.get("count", COUNT))
        settings: dict[str, Any] = {"seed": SEED, "count": count, "drawn": min(DRAWN, count), **given}
        found[name] = GeometryConfig(**settings)
    return found


def command(name: str, config: GeometryConfig, out: Path) -> str:
    """Return the command line of a run."""
    plain = GeometryConfig(config.model)
    words = [f"fanal geometry {config.model}"]
    words += [f"--against {text}" for text in config.against]
    for key in ("label", "data", "noise", "count", "drawn", "seed"):
        value = getattr(config, key)
        words += [f"--{key} {value}"] if value != getattr(plain, key) else []
    return " ".join([*words, f"--out {out / name}"])


def measure(out: Path) -> None:
    """Make the runs that are missing."""
    out.mkdir(parents=True, exist_ok=True)
    for name in CODES:
        if not (out / name).exists():
            noisy = name == "codes-noisy"
            config = EncodeConfig("hands32", "hands32", split="train", steps=(60,), count=ENCODED, noisy=noisy)
            encode_run(config, out / name)
    train_networks(out / NETWORKS)
    noised_images("digits8", COUNT, out / "noised.safetensors")
    for name, config in runs(out).items():
        if not (out / name).exists():
            print(command(name, config, out), flush=True)
            geometry(config, out / name)


def expected(told: list[Told]) -> dict[str, tuple[Tensor, ...]]:
    """By set, the curves of [REG] prop. 4 over the levels of the Gaussian's run."""
    levels = {t.name: torch.tensor(t.sigmas, dtype=torch.float64) for t in told}
    names = [name for name in FITS if f"gaussian-{name}" in levels]
    return {name: findings_exact.residual_of(name, levels[f"gaussian-{name}"]) for name in names}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("findings"), help="folder of the runs")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--tables", action="store_true", help="only print the tables of the runs that are there")
    only.add_argument("--computed", action="store_true", help="only what is computed without a run")
    given = parser.parse_args()
    if not given.tables and not given.computed:
        measure(given.out)
    if not given.computed:
        told = [Told(name, given.out / name) for name in runs(given.out) if (given.out / name / "run.json").is_file()]
        told.sort(key=lambda t: (t.d, ":" in t.model, t.name))
        print("\n".join(command(t.name, runs(given.out)[t.name], given.out) for t in told))
        tables(told, given.out, expected(told))
    if not given.tables:
        networks = [str(given.out / NETWORKS / "ddpmpp-vp")] if (given.out / NETWORKS / "ddpmpp-vp").is_dir() else []
        findings_exact.growth()
        findings_exact.shifts()
        findings_exact.annealed()
        findings_exact.processes(["mixture:digits8", "digits8", *networks])
        findings_exact.own_samplers(["mixture:digits8", "digits8", *networks])


if __name__ == "__main__":
    main()
