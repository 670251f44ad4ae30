"""GITS's experiments: cells are recomputed from the parts, studies agree where they meet, and paths are proved."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch

import fanal as package
from fanal import gits
from fanal.bench import gits as bench
from fanal.bench.gits import GitsConfig
from fanal.bench.gits_paths import branch_and_bound, path_cost
from fanal.bench.gits_studies import STUDIES
from fanal.bench.gits_subject import Sizes
from fanal.bench.gits_tables import spreads, weights
from fanal.bench.plans import compare
from fanal.bench.schedules import spendable
from fanal.config import build_solver
from fanal.errors import FanalError
from fanal.files import read_tensors
from fanal.schedule_search.paths import shortest
from fanal.schedules import logsnr
from fanal.seeding import noise
from fanal.solvers import IPNDM, RK4, Euler
from toys import fanal

TINY = dataclasses.replace(
    Sizes.quick(), solvers=("euler", "dpm2", "ipndm:order=4"), fitted=("euler",), test=12, light=12, reference=60
)
STUDENT = "ipndm:order=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return compare(GitsConfig(("grid2",), sizes=TINY), tmp_path_factory.mktemp("gits") / "run")


@pytest.fixture(scope="module")
def studies(folder):
    return json.loads((folder / "run.json").read_text())["results"]["models"]["grid2"]["studies"]


def costs(nodes, seed):
    """Costs of both signs, with an upper triangle only."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(nodes, nodes, dtype=torch.float64, generator=generator) - 0.2
    return torch.where(torch.ones(nodes, nodes).triu(1) > 0, values, math.inf)


@pytest.mark.parametrize("coeff", [0.8, 1.0, 1.15])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_branch_and_bound_finds_the_cheapest_of_all_paths(steps, coeff):
    cost = costs(9, seed=steps)
    every = [(0, *inner, 8) for inner in itertools.combinations(range(1, 8), steps - 1)]
    best = min(every, key=lambda path: path_cost(cost, path, coeff))
    found = branch_and_bound(cost, steps, coeff)
    assert found.path == best
    assert found.value == pytest.approx(path_cost(cost, best, coeff), rel=1e-12)
    assert found.paths == len(every)
    assert shortest(cost, [steps], coeff)[steps] == list(best)


def test_branch_and_bound_leaves_paths_out():
    """Costs that grow with the square of the jump, as a local error does: most paths are ruled out unseen."""
    at = torch.arange(16, dtype=torch.float64)
    cost = (at[None] - at[:, None]).clamp_min(0) ** 2
    found = branch_and_bound(cost, 5)
    assert found.path == (0, 3, 6, 9, 12, 15)
    assert found.visited < found.paths
    with pytest.raises(FanalError, match="room for 1 to 15"):
        branch_and_bound(cost, 16)


def test_a_cell_is_the_distance_to_the_true_end(folder):
    """Euler on the grid of a search of its own, from the same warm-up noise."""
    errors, _ = read_tensors(folder / "errors.safetensors")
    model = package.load("grid2")
    warm, x = (noise((2,), range(n), 80.0, stream=s) for n, s in ((8, "bench warm-up"), (12, "bench test")))
    grid = gits.search(model, warm, [4]).schedules[4]
    ends = package.sample(model, x, logsnr(60, zero=False), RK4())
    off = package.sample(model, x, grid, Euler()) - ends
    expected = off.square().mean(1).sqrt()
    torch.testing.assert_close(errors["grid2|solvers|euler, gits|4"], expected, rtol=1e-4, atol=1e-6)


def test_studies_agree_where_they_meet(studies):
    """The authors' defaults are one row of every study."""
    rows = {
        "solvers": f"{STUDENT}, gits",
        "transfer": "searched on grid2",
        "nodes": "61",
        "teachers": f"{STUDENT}, 60 calls",
        "coeffs": f"{STUDENT}, 1.15",
        "metrics": "dev",
    }
    for calls in (4, 5):
        figures = [studies[study][f"{row}|{calls}"]["rms"]["value"] for study, row in rows.items()]
        assert figures == pytest.approx([figures[0]] * len(rows), rel=1e-6)
    other = studies["nodes"]["11|4"]["sigmas"]
    assert set(other) < set(package.schedules.polynomial(10, zero=False).tolist())
    assert studies["solvers"]["ipndm:order=4, polynomial|4"] == studies["transfer"]["polynomial|4"]


def test_a_sample_alone_has_the_schedule_of_its_own_search(folder):
    errors, _ = read_tensors(folder / "errors.safetensors")
    model = package.load("grid2")
    x = noise((2,), range(12), 80.0, stream="bench test")[2:3]
    ends = package.sample(model, x, logsnr(60, zero=False), RK4())
    grid = gits.search(model, x, [5]).schedules[5]
    expected = (package.sample(model, x, grid, IPNDM(4)) - ends).square().mean().sqrt()
    found = errors["grid2|alone|these samples, one for each|5"]
    assert len(found) == 4
    assert float(found[2]) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


def test_calls_are_counted(studies):
    assert studies["solvers"]["dpm2, gits|4"]["calls"] == 4
    assert len(studies["solvers"]["dpm2, gits|4"]["sigmas"]) == 3
    assert "dpm2, gits|5" not in studies["solvers"]
    assert studies["coeffs"][f"{STUDENT}, 1.15, AFS|5"]["calls"] == 5  # six intervals, the first of them free
    assert len(studies["coeffs"][f"{STUDENT}, 1.15, AFS|5"]["sigmas"]) == 7
    assert spendable(build_solver("heun"), (3, 4, 10)) == [(4, 2), (10, 5)]
    assert spendable(build_solver("rk4"), (3, 4, 10)) == [(4, 1)]


def test_every_path_is_proved(studies):
    for own in studies["proofs"].values():
        assert own["dp"] == pytest.approx(own["value"], rel=1e-9)
        assert own["dp_path"] == own["path"]
    assert {cell.partition("|")[0] for cell in studies["proofs"]} == {
        f"{metric}, {nodes} nodes" for metric in ("dev", "l2") for nodes in (21, 61)
    }


def test_the_spread_is_over_sets_of_warm_up_samples(studies):
    cells = {
        f"4, set {i}|6": {"rms": {"value": v}, "sigmas": [80.0, s, 0.002]}
        for i, (v, s) in enumerate(((1.0, 3.0), (3.0, 2.0), (2.0, 3.0)))
    }
    own = spreads(cells)["4|6"]
    assert own["rms"]["value"] == pytest.approx(2)
    assert own["rms"]["se"] == pytest.approx(1)  # the deviation of one set, not of their mean
    assert own["schedules"] == 2
    sets = [studies["warmups"][f"4, set {i}|4"]["rms"]["value"] for i in range(2)]
    assert studies["warmups"]["4|4"]["rms"]["value"] == pytest.approx(sum(sets) / 2)


def test_weights_tell_how_much_of_a_state_is_kept():
    sigmas = [80.0, 8.0, 2.0, 0.002]
    assert weights(sigmas) == pytest.approx([0.1, 0.25, 0.001])
    assert math.prod(weights(sigmas)) == pytest.approx(sigmas[-1] / sigmas[0])


def test_the_folder_has_tables_and_plots(folder):
    text = (folder / "tables.md").read_text()
    for study in STUDIES:
        assert f"### grid2: {study}\n" in text
    assert "Fréchet distance" in text  # twelve points of two numbers each are enough for it
    assert "**no**" not in text
    page = (folder / "plots.html").read_text()
    assert "schedules as weights" in page


def test_a_stopped_comparison_goes_on(tmp_path, monkeypatch, studies):
    config = GitsConfig(("grid2",), ("metrics", "proofs"), TINY)
    work = bench.run

    def stops(name, *rest):
        if name == "proofs":
            raise KeyboardInterrupt
        return work(name, *rest)

    monkeypatch.setattr(bench, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        compare(config, tmp_path / "run")
    monkeypatch.setattr(bench, "run", work)
    said = []
    made = compare(config, tmp_path / "run", say=said.append)
    assert said == ["resuming: 2 studies are there already"]
    own = json.loads((made / "run.json").read_text())["results"]["models"]["grid2"]["studies"]
    assert own["proofs"] == studies["proofs"]


def test_what_cannot_be_studied_is_refused(tmp_path):
    with pytest.raises(FanalError, match="each model once"):
        GitsConfig(())
    with pytest.raises(FanalError, match="study"):
        GitsConfig(("grid2",), ("solver",))
    with pytest.raises(FanalError, match="no more alone"):
        Sizes(alone=99)
    with pytest.raises(FanalError, match="2 calls or more"):
        Sizes(calls=(1, 4))
    with pytest.raises(FanalError, match="names no data set"):
        compare(GitsConfig(("mixture:ring8",)), tmp_path / "run")


def test_the_command_says_its_tables(tmp_path):
    given = ("--quick", "--studies", "proofs", "--test", 8, "--warmup", 4)
    told = fanal("bench", "gits", "grid2", *given, "--out", tmp_path / "run")
    assert told.exit_code == 0, told.output
    assert (tmp_path / "run" / "tables.md").read_text() in told.stdout
    told = fanal("bench", "gits", "grid2", "--studies", "nothing", "--out", tmp_path / "other")
    assert (told.exit_code, "unknown study" in told.output) == (2, True)
