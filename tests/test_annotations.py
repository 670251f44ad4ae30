"""The shapes and types in signatures are true: the main job runs with every annotation checked at run time."""

import os
import subprocess
import sys

PIPELINE = """
from jaxtyping import install_import_hook

with install_import_hook("fanal", "beartype.beartype"):
    import torch
    import fanal
    from fanal import hallucination, metrics, pictures
    from fanal.seeding import noise

D = fanal.load("mixture:grid2")
sigmas = fanal.schedules.polynomial(12)
for name, kind in fanal.solvers.SOLVERS.items():
    x = noise(D.shape, range(6), 80.0)
    run = fanal.Trajectory.record(fanal.trace(D, x, sigmas, kind(), range(6)))
    assert run.x.shape == (13, 6, 2)
law = fanal.exact.Gaussian(torch.zeros(3, 2), 1.0)
y = noise((3, 2), range(4))
law.score(y, torch.tensor(2.0)), law.log_density(y, torch.full((4,), 2.0))
law.solution(y, torch.tensor(2.0), torch.tensor(1.0))
eye = hallucination.Variance((0.0, 1.0))
first = hallucination.watch(D, x, sigmas, fanal.solvers.Euler(), eye, range(6))
limit = float(first.risk.median())
for repair in (hallucination.Redo(), hallucination.Renoise(2.0, 2)):
    after = repair.repair(D, x, sigmas, fanal.solvers.Euler(), eye, range(6), first, limit)
metrics.auc(first.risk, first.risk > limit), metrics.rate(first.risk > limit), metrics.spread(after.x, x)
pictures.grid(after.x)
try:
    noise(D.shape, "seeds")
except Exception as error:
    assert "jaxtyping" in type(error).__module__, error  # the hook is in force
else:
    raise SystemExit("annotations were not checked")
"""


def test_annotations_hold_at_run_time():
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
