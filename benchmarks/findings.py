"""Which observations about trajectories hold on small data? Measures the findings page's models and prints its tables.

Each run is a folder of `fanal geometry` (the script prints its command), is resumed where it was stopped, and is not
repeated once it is there. Tables come from the folders' run.json alone.

    python benchmarks/findings.py --out findings
    python benchmarks/findings.py --out findings --tables     # of the runs that are there
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fanal.encoding import EncodeConfig, encode_run
from fanal.files import read_json, read_tensors
from fanal.geometry.command import GeometryConfig, geometry
from fanal.geometry.regularity import MEASURES
from fanal.metrics.estimates import Estimate, mean

SEED, COUNT, DRAWN, ENCODED = 5, 128, 48, 32
LEVELS = (60.0, 20.0, 10.0, 5.0, 3.0, 1.0, 0.3, 0.1, 0.03)
"""Noise levels at which the score's deviation is told."""

CODES = {"codes": False, "codes-noisy": True}
SLOPES = (20.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.004)
COSINES = (10.0, 1.0, 0.1, 0.01)
NEARER = "nearer to the end than the state"
DISTANCES = {"states": "distance", "predictions": "denoised distance", "z": "z distance"}
BENDS = (40.0, 20.0, 10.0, 5.0, 2.0, 1.0, 0.3, 0.1, 0.03)


def runs(out: Path) -> dict[str, GeometryConfig]:
    """Return the runs by name, in the order in which they can be made: the last ones compare with those before."""
    own: dict[str, dict[str, Any]] = {
        "mixture-grid2": {"model": "mixture:grid2"},
        "grid2": {"model": "grid2", "data": "grid2"},
        "gaussian-digits8": {"model": "gaussian:digits8"},
        "mixture-digits8": {"model": "mixture:digits8"},
        "data-digits8": {"model": "data:digits8", "data": "digits8"},
        "digits8": {"model": "digits8", "data": "digits8"},
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
    for name, noisy in CODES.items():
        if not (out / name).exists():
            config = EncodeConfig("hands32", "hands32", split="train", steps=(60,), count=ENCODED, noisy=noisy)
            encode_run(config, out / name)
    for name, config in runs(out).items():
        if not (out / name).exists():
            print(command(name, config, out), flush=True)
            geometry(config, out / name)


class Told:
    """A run's results."""

    def __init__(self, name: str, folder: Path) -> None:
        record = read_json(folder / "run.json")
        self.name, self.model, self.results = name, str(record["config"]["model"]), record["results"]
        self.sigmas = [float(sigma) for sigma in self.results["sigmas"]]
        self.curvature = read_tensors(folder / "geometry.safetensors")[0]["curvature"]

    def number(self, name: str) -> Estimate | None:
        """A figure per trajectory, or of the drawn ones."""
        found = (self.results["numbers"] | self.results["shape"]).get(name)
        if found is None or found["value"] is None:
            return None
        return Estimate(found["value"], math.nan if found["se"] is None else found["se"], found["n"])

    def at(self, name: str, sigma: float) -> str:
        """A curve's mean ± standard error at the level that is nearest in log sigma."""
        band = self.results["bands"].get(name)
        if band is None:
            return "–"
        levels = range(len(band["mean"]))
        i = min(levels, key=lambda k: abs(math.log(max(self.sigmas[k], 1e-9) / sigma)))
        return f"{band['mean'][i]:.3f} ± {band['se'][i]:.3f}"

    def rises(self, name: str) -> str:
        """Number of steps at which a curve's mean rises, above rounding, and where the largest of them is."""
        told = self.results["bands"][name]["mean"]
        steps = [(b - a, self.sigmas[i]) for i, (a, b) in enumerate(itertools.pairwise(told)) if b - a > 1e-4 * told[0]]
        if not steps:
            return "never rises"
        risen = sum(up for up, _ in steps) / told[0]
        return f"rises at {len(steps)} of {len(told) - 1} steps, by {risen:.1%} of the first"

    def bend(self, sigma: float) -> str:
        """Mean curvature of the drawn trajectories times sigma √d, ± standard error, near a level."""
        i = min(range(len(self.sigmas) - 1), key=lambda k: abs(math.log(self.sigmas[k] / sigma)))
        return mean(self.curvature[:, i]).plain(3)


def _cell(found: Estimate | None, digits: int) -> str:
    return "–" if found is None else found.plain(digits)


def _percent(found: Estimate | None, digits: int = 1) -> str:
    if found is None:
        return "–"
    return Estimate(100 * found.value, 100 * found.se, found.n).plain(digits) + " %"


def _spread(found: Estimate | None) -> str:
    """A share in the form of [REG] table 7: percent, ± one standard deviation over trajectories."""
    if found is None:
        return "–"
    return f"{100 * found.value:.5f} ± {100 * found.se * math.sqrt(found.n):.5f} %"


Column = tuple[str, Callable[[Told], str]]


def _numbers(names: Mapping[str, tuple[str, int]]) -> list[Column]:
    """Columns by heading: a figure's name, and its digits."""
    return [(head, lambda t, n=name, k=digits: _cell(t.number(n), k)) for head, (name, digits) in names.items()]


def table(title: str, told: Sequence[Told], columns: Sequence[Column]) -> None:
    """Print a table in Markdown."""
    rows = [[t.name, *(make(t) for _, make in columns)] for t in told]
    rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
    print(f"\n{title}\n")
    head = ["run", *(name for name, _ in columns)]
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")


def _matrix(told: Told, key: str) -> None:
    found = told.results["regularity"]
    names = [Path(name).name for name in found["names"]]
    print(f"\n{key}: mean distance of two trajectories\n")
    rows = [["", *names], ["---"] * (len(names) + 1)]
    for name, values, errors in zip(names, found[key], found["se"][key], strict=True):
        rows.append([name, *("–" if v is None else f"{v:.2f} ± {e:.2f}" for v, e in zip(values, errors, strict=True))])
    for row in rows:
        print(f"| {' | '.join(row)} |")


def _codes(out: Path) -> None:
    """Unit noise that images are encoded to, as they are and with the smallest sigma's noise."""
    print("\ncodes\n\n| run | norm / √d | round trip |\n| --- | --- | --- |")
    for name in CODES:
        if (out / name / "run.json").is_file():
            row = read_json(out / name / "run.json")["results"]["table"][-1]
            cells = [Estimate(**row[key]).plain(4) for key in ("norm / sqrt d", "round trip")]
            print("|", " | ".join([name, *cells]), "|")


def _classes(told: Told) -> None:
    """Distances within classes and between them: mean, smallest and largest."""
    found = told.results["regularity"]
    size = len(found["names"])
    print("\n| classes apart | within | between |\n| --- | --- | --- |")
    for key in MEASURES:
        cells = {
            same: [found[key][i][j] for i in range(size) for j in range(i + 1) if (i == j) == same] for same in (1, 0)
        }
        print(
            "|",
            " | ".join([key, *(f"{sum(v) / len(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in cells.values())]),
            "|",
        )


def _alike(told: Sequence[Told]) -> None:
    """Within each model, and by chance."""

    def within(t: Told, key: str) -> str:
        found = t.results["regularity"]
        cells = [(found[key][i][i], found["se"][key][i][i]) for i in range(len(found["names"]))]
        own = cells[: len(set(t.results["groups"]))]
        values = [value for value, _ in own if value is not None]
        if len(own) > 1:
            return f"{sum(values) / len(values):.2f}"
        return f"{own[0][0]:.2f} ± {own[0][1]:.2f}"

    def chance(t: Told, null: str, key: str) -> str:
        found = t.results["regularity"]["nulls"][null][key]
        return f"{found['value']:.2f} ± {found['se']:.2f}"

    columns: list[Column] = [(key, lambda t, k=key: within(t, k)) for key in MEASURES]
    columns += [(f"procrustes, {null}", lambda t, n=null: chance(t, n, "procrustes")) for null in ("smooth", "forward")]
    columns += [(f"{key}, smooth", lambda t, k=key: chance(t, "smooth", k)) for key in ("curvature", "torsion")]
    columns += [("explained by 2", lambda t: _percent(t.number("explained by 2")))]
    columns += [("forward noise", lambda t: _forward(t, "explained by 2"))]
    columns += [("in many dimensions", lambda t: _forward(t, "explained by 2, in many dimensions"))]
    table("alike", told, columns)


def _forward(told: Told, key: str) -> str:
    found = told.results["regularity"]["nulls"]["forward"][key]
    return f"{100 * (found['value'] if isinstance(found, dict) else found):.1f} %"


def _score(told: Sequence[Told]) -> None:
    """The deviation of the score by noise level, on both paths."""
    some = [t for t in told if "score deviation" in t.results["bands"] and not t.model.startswith("data:")]
    for name in ("score deviation", "score deviation on exact path"):
        table(name, some, [(f"{sigma:g}", lambda t, s=sigma, n=name: t.at(n, s)) for sigma in LEVELS])
    names = {
        "end to a training point": ("end to nearest point / sqrt d", 3),
        "exact end to one": ("exact end to nearest point / sqrt d", 3),
        "ends apart": ("ends apart / sqrt d", 3),
        "one nearest point": ("both ends have one nearest point", 2),
    }
    table("both ends", [t for t in told if "likelihood" in t.results], _numbers(names))
    for t in some:
        levels = [f"{each['sigma']:.3g} (z {each['z']:.1f})" for each in t.results["flagged"]]
        print(f"\n{t.name}: levels that stand out: {', '.join(levels) or 'none'}")


def _likelihood(told: Sequence[Told]) -> None:
    def share(t: Told, key: str) -> str:
        found = t.results.get("likelihood")
        return "–" if found is None else f"{100 * found[key]['value']:.2f} ± {100 * (found[key]['se'] or 0):.2f} %"

    heads = {"met": "d1 ≤ d2", "state": "p(x') ≥ p(x)", "prediction": "p(D) ≥ p(x)"}
    table("likelihood, share of steps", told, [(head, lambda t, k=key: share(t, k)) for key, head in heads.items()])


def tables(out: Path) -> None:
    """Print the tables of the runs that are there."""
    told = [Told(name, out / name) for name in runs(out) if (out / name / "run.json").is_file()]
    told.sort(key=lambda t: (t.results["d"], ":" in t.model, t.name))
    print("\n".join(command(t.name, runs(out)[t.name], out) for t in told))
    straight = {
        "length / (sigma_max √d)": ("length / (sigma_max sqrt d)", 4),
        "deviation / chord": ("largest deviation / chord", 4),
        "predictions' deviation / chord": ("denoised largest deviation / chord", 3),
    }
    cosines: list[Column] = [(f"cosine at {sigma:g}", lambda t, s=sigma: t.at("angle", s)) for sigma in COSINES]
    table("straight?", told, [("d", lambda t: str(t.results["d"])), *_numbers(straight), *cosines])
    table("monotone?", told, [(head, lambda t, n=name: t.rises(n)) for head, name in DISTANCES.items()])
    near = {name: (f"{name} near the end from sigma", 3) for name in ("states", "predictions")}
    nearer: Column = ("prediction nearer than the state", lambda t: _percent(t.number(f"prediction {NEARER}"), 2))
    table("faster?", told, [*_numbers(near), nearer])
    _score(told)
    _likelihood(told)
    table("table 7", told, [(f"Top-{k}", lambda t, k=k: _spread(t.number(f"direct, top {k}"))) for k in (1, 2, 3)])
    table(
        "dimensions",
        told,
        [(f"explained by {k}", lambda t, k=k: _percent(t.number(f"explained by {k}"))) for k in (1, 2, 3)]
        + _numbers({f"distance in {k}-D": (f"mean error in {k}-D", 3) for k in (1, 2, 3, 4)}),
    )
    table("curvature", told, [(f"{sigma:g}", lambda t, s=sigma: t.bend(s)) for sigma in BENDS])
    table(
        "stages",
        told,
        _numbers(
            {
                "curved from sigma": ("curved from sigma", 2),
                "to": ("curved to sigma", 2),
                "counted down to": ("kept to sigma", 2),
                "posterior open from sigma": ("stage.entropy.first", 2),
                "to ": ("stage.entropy.last", 2),
                "rebuilt curve, residual / size": ("rebuilt residual / size", 4),
            }
        ),
    )
    table(
        "in variance-preserving space",
        told,
        [
            *_numbers(
                {
                    f"{n} / chord": (f"z {m} / chord", 3)
                    for n, m in (("deviation", "largest deviation"), ("length", "length"))
                }
            ),
            ("explained by 1", lambda t: _percent(t.number("z explained by 1"))),
            ("explained by 2", lambda t: _percent(t.number("z explained by 2"))),
        ],
    )
    _alike(told)
    table("slope", told, [(f"{sigma:g}", lambda t, s=sigma: t.at("slope", s)) for sigma in SLOPES])
    _codes(out)
    for t in told:
        if t.name == "digits8-classes":
            _classes(t)
        if t.name == "hands32":
            for key in MEASURES:
                _matrix(t, key)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("findings"), help="folder of the runs")
    parser.add_argument("--tables", action="store_true", help="only print the tables")
    given = parser.parse_args()
    if not given.tables:
        measure(given.out)
    tables(given.out)


if __name__ == "__main__":
    main()
