"""GITS's own questions, asked of embedded models: grid size, warm-up size, γ with and without the free first step,
transfer between models, and what its schedules look like as weights.

Each answer is the error of the student against 60 steps of the teacher on held-out samples, as RMS with its standard
error. `python benchmarks/schedules_gits.py --out benchmarks/results/schedules_gits.json`
"""

import argparse
import statistics
from pathlib import Path

import torch

from fanal import gits
from fanal.files import write_json
from fanal.loading import load
from fanal.runs import versions
from fanal.schedule_search import Student, error_of, teach
from fanal.schedules import polynomial
from fanal.solvers import AFS, IPNDM

CALLS = (4, 5, 6, 8)


class Judge:
    """Held-out samples of one model, and where 60 steps of the teacher take them."""

    def __init__(self, name, count):
        self.name, self.model = name, load(name)
        self.base = gits.search(self.model, 32, list(CALLS), solver=IPNDM(3), holdout=count)
        self.student = Student(self.model, self.base.judged.x[0], self.base.judged.x[-1])

    def rms(self, sigmas, solver):
        return error_of(self.student.errors(sigmas, solver)).rms


def grid_sizes(judge):
    """Table of nodes of the teacher's grid × calls."""
    rows = {}
    for nodes in (11, 21, 31, 61, 101):
        grid = polynomial(nodes - 1, judge.model.sigma_min, judge.model.sigma_max, zero=False)
        found = gits.search(judge.model, 32, list(CALLS), sigmas=grid)
        rows[nodes] = {k: judge.rms(found.schedules[k], IPNDM(3)) for k in CALLS}
    return rows


def warm_ups(judge, seeds=3):
    """Table of warm-up samples × calls: mean over seeds, and the largest over the smallest."""
    rows = {}
    for count in (1, 4, 16, 32):
        found = [gits.search(judge.model, count, list(CALLS), seed=seed + 10) for seed in range(seeds)]
        rows[count] = {}
        for k in CALLS:
            values = [judge.rms(f.schedules[k], IPNDM(3)).value for f in found]
            rows[count][k] = (statistics.mean(values), max(values) / min(values))
    return rows


def coefficients(judge):
    """Table of γ and the analytical first step × calls."""
    rows = {}
    for coeff in (1.0, 1.05, 1.1, 1.15, 1.2, 1.3):
        plain = gits.search(judge.model, 32, list(CALLS), solver=IPNDM(3), coeff=coeff, teacher=judge.base, holdout=0)
        rows[f"{coeff}"] = {k: judge.rms(plain.schedules[k], IPNDM(3)) for k in CALLS}
    free = gits.search(judge.model, 32, list(CALLS), solver=IPNDM(3), afs=True, teacher=judge.base, holdout=0)
    rows["1.15, AFS"] = {k: judge.rms(free.schedules[k], AFS(IPNDM(3))) for k in CALLS}
    return rows


def transfers(judges):
    """Table of the model that was searched × the model that is sampled, and a fixed grid."""
    rows = {}
    for there in judges:
        for here in judges:
            own = there.base.schedules
            rows[f"{there.name} → {here.name}"] = {k: here.rms(own[k], IPNDM(3)) for k in CALLS}
    for here in judges:
        low, high = here.model.sigma_min, here.model.sigma_max
        rows[f"polynomial → {here.name}"] = {k: here.rms(polynomial(k, low, high, zero=False), IPNDM(3)) for k in CALLS}
    return rows


def per_sample(judge, count=8):
    """One schedule for each sample, against one for all, on the very samples that were searched."""
    x = judge.base.judged.x[0][:count]
    run = teach(judge.model, x, judge.base.teacher.sigmas, judge.base.pilot)
    rows = {"one for all": {}, "one for each": {}}
    together = gits.search(judge.model, x, list(CALLS))
    alone = [gits.search(judge.model, x[b : b + 1], list(CALLS)) for b in range(count)]
    for k in CALLS:
        student = Student(judge.model, x, run.x[-1])
        rows["one for all"][k] = error_of(student.errors(together.schedules[k], IPNDM(3))).rms
        each = [
            Student(judge.model, x[b : b + 1], run.x[-1][b : b + 1]).errors(alone[b].schedules[k], IPNDM(3))
            for b in range(count)
        ]
        rows["one for each"][k] = error_of(torch.cat(each)).rms
    return rows


def shown(title, rows):
    print(f"\n{title}\n\n| | {' | '.join(map(str, CALLS))} |\n| --- |{' --- |' * len(CALLS)}")
    for name, row in rows.items():
        cells = [f"{v[0]:.3f} ({v[1]:.2f})" if isinstance(v, tuple) else v.plain(3) for v in row.values()]
        print(f"| {name} | {' | '.join(cells)} |")


def plain(rows):
    return {
        str(name): {str(k): list(v) if isinstance(v, tuple) else [v.value, v.se] for k, v in row.items()}
        for name, row in rows.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64, help="held-out samples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judges = [Judge(name, options.count) for name in ("hands32", "shapes32")]
    hands = judges[0]
    found = {
        "nodes of the teacher's grid": grid_sizes(hands),
        "warm-up samples: mean RMS over 3 seeds (largest / smallest)": warm_ups(hands),
        "γ": coefficients(hands),
        "searched on → sampled from": transfers(judges),
        "schedules": per_sample(hands),
    }
    for title, rows in found.items():
        shown(title, rows)
    ratios = {
        judge.name: {str(k): (grid[1:] / grid[:-1]).tolist() for k, grid in judge.base.schedules.items()}
        for judge in judges
    }
    print("\nweights sigma_next / sigma")
    for name, own in ratios.items():
        for k, values in own.items():
            print(name, k, " ".join(f"{v:.3f}" for v in values))
    tables = {title: plain(rows) for title, rows in found.items()}
    write_json(options.out, {"versions": versions(), "count": options.count, "tables": tables, "weights": ratios})


if __name__ == "__main__":
    main()
