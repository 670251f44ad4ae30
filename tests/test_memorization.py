"""The audit catches what replays its data, clears what does not, and counts chance rightly."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import integrate, optimize, stats

import fanal as package
from fanal.datasets import get
from fanal.datasets.levels import levels_of
from fanal.errors import FanalError
from fanal.exact import Dataset
from fanal.memorization import command, copied, neighbors, settling, threshold, typical
from fanal.memorization.command import AuditConfig, audit
from fanal.memorization.settling import COLLAPSED
from fanal.preparation import prepare
from fanal.report import write_report
from fanal.report.audit import verdict
from fanal.trajectory import Trajectory
from toys import fanal, record, refused


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_copy_has_ratio_0_and_new_points_near_1():
    train = normal(400, 30)
    exact = Dataset(train)
    copies, fresh = (
        neighbors(exact, train[:20] + 1e-4 * normal(20, 30, seed=1)),
        neighbors(exact, normal(20, 30, seed=2)),
    )
    assert torch.equal(copies.index, torch.arange(20))
    assert float(copies.ratio.max()) < 1e-3
    assert torch.allclose(copies.distance, 1e-4 * normal(20, 30, seed=1).square().mean(1).sqrt(), rtol=1e-3)
    assert float(fresh.ratio.min()) > 0.6
    want = torch.cdist(normal(20, 30, seed=2), train).sort().values
    assert torch.allclose(fresh.ratio, want[:, 0] / want[:, 1:21].mean(1))


def test_doubled_training_points_do_not_hide_copies():
    """The second neighbor would be at distance 0 too; a mean over twenty is not."""
    train = normal(60, 30).repeat(2, 1)
    assert float(neighbors(Dataset(train), train[:5] + 1e-3).ratio.max()) < 0.01
    assert neighbors(Dataset(torch.zeros(3, 2)), torch.zeros(1, 2)).ratio.tolist() == [0]


def test_the_threshold_holds_its_level():
    """New points fall below it at the stated rate: 400 repetitions, 4 standard errors."""
    shares = []
    for seed in range(400):
        values = normal(300, seed=seed)
        shares.append(float((values[199:] < threshold(values[:199], 0.05)).double().mean()))
    error = float(torch.tensor(shares).std()) / math.sqrt(len(shares))
    assert abs(sum(shares) / len(shares) - 0.05) < 4 * error


def test_chance_is_counted_with_the_threshold_of_finite_data():
    """p is uniform or conservative when nothing is replayed: the beta-binomial, by 600 repetitions."""
    small = 0
    for seed in range(600):
        values = normal(159, seed=1000 + seed)
        small += copied(values[99:], values[:99], 0.05).p <= 0.05
    assert stats.binomtest(small, 600, 0.05, "greater").pvalue > 1e-4
    found = copied(torch.full((10,), -9.0), normal(99), 0.01)
    assert (found.count, found.share, found.excess) == (10, 1, 1)
    assert found.low == pytest.approx(0.025 ** (1 / 10))  # Clopper–Pearson at 10 of 10
    assert found.p < 1e-12


@pytest.mark.parametrize(("total", "held", "level"), [(5, 9, 0.1), (8, 39, 0.1), (20, 99, 0.05)])
def test_chance_is_a_matter_of_ranks(total, held, level):
    """By counting orders: of all ways to mix samples and held-out points, in how many do so many samples come first."""
    rank, known = math.floor(level * (held + 1)), torch.arange(held, dtype=torch.float64)
    for count in range(total + 1):
        ratio = torch.cat([torch.full((count,), -1.0), torch.full((total - count,), 1e9)]).double()
        ways = sum(
            math.comb(k + rank - 1, k) * math.comb(total - k + held - rank, total - k) for k in range(count, total + 1)
        )
        assert copied(ratio, known, level).p == pytest.approx(ways / math.comb(total + held, total), rel=1e-9)


def test_too_little_is_refused():
    with pytest.raises(FanalError, match="99 or more"):
        threshold(normal(50), 0.01)
    with pytest.raises(FanalError, match="level"):
        threshold(normal(50), 1.0)
    with pytest.raises(FanalError, match="no sample"):
        copied(normal(0), normal(99))
    with pytest.raises(FanalError, match="two points"):
        neighbors(Dataset(normal(1, 3)), normal(2, 3))


def test_exact_runs_settle_and_never_leave():
    points = normal(20, 6, seed=3)
    D = Dataset(points)
    x = package.noise(D.shape, range(9), 80.0).double()
    run = Trajectory.record(package.trace(D, x, package.schedules.polynomial(24), package.solvers.Heun()))
    found = settling(D, run)
    assert bool((found.leave.isnan() & found.apart.isnan()).all())
    assert float(found.gap.max()) < 1e-9
    assert not bool(found.cell.isnan().any() | found.collapse.isnan().any())
    levels, final = run.sigmas[:-1], D.nearest(run.x[-1])[1][:, 0]
    for b in range(9):  # by the definition
        own = [int(D.nearest(state[b : b + 1])[1]) == int(final[b]) for state in run.x[:-1]]
        first = min(i for i in range(len(own)) if all(own[i:]))
        assert float(found.cell[b]) == float(levels[first])
    with pytest.raises(FanalError, match="tolerance"):
        settling(D, run, 0.0)


@pytest.fixture(scope="module")
def caught(tmp_path_factory):
    config = AuditConfig("data:digits8", "digits8", steps=10, count=40, block=16, traced=20, held=199)
    return audit(config, tmp_path_factory.mktemp("audit") / "run")


def test_a_replaying_model_is_caught(caught):
    results = record(caught)["results"]
    assert results["copies"]["share"] == 1
    assert results["copies"]["excess_low"] > 0.9
    assert verdict(results).startswith("The model replays")
    assert results["settling"]["leave"]["share"] == 0
    assert results["settling"]["cell"]["share"] == 1
    kept = load_file(caught / "samples.safetensors")
    train = get("digits8").data().x
    assert torch.allclose(kept["x"], train[kept["index"]], atol=1e-2)
    assert (caught / "pairs.png").stat().st_size > 1000
    assert results["points"] == len(train)
    assert "p < 1e-300" in verdict(results | {"copies": results["copies"] | {"p": 0.0}})


def test_a_model_of_the_law_is_cleared(tmp_path):
    config = AuditConfig("gaussian:digits8", "digits8", steps=10, count=60, traced=0, held=199)
    results = record(audit(config, tmp_path / "run"))["results"]
    assert verdict(results).startswith("No sign")
    assert results["copies"]["p"] > 0.01
    assert results["settling"] == {}


def test_doubled_held_out_points_are_told(caught):
    """A threshold of 0 calls nothing a copy, not even copies: that is no clean bill."""
    train = normal(60, 6)
    held = neighbors(Dataset(train), torch.cat([train[:10], normal(190, 6, seed=1)]))
    copies = neighbors(Dataset(train), train[:20] + 1e-4).ratio
    results = record(caught)["results"]
    found = {**results, "copies": dataclasses.asdict(copied(copies, held.ratio)), "threshold": threshold(held.ratio)}
    assert found["copies"]["count"] == 0
    assert "cannot be told" in verdict(found)
    assert "cannot be told" not in verdict(found | {"threshold": results["threshold"]})
    assert results["threshold"] > 0.3


def test_blocks_do_not_matter(caught, tmp_path):
    config = AuditConfig("data:digits8", "digits8", steps=10, count=40, block=40, traced=20, held=199)
    other = record(audit(config, tmp_path / "run"))["results"]
    mine = record(caught)["results"]
    assert other["copies"] == mine["copies"]
    assert other["settling"]["cell"] == mine["settling"]["cell"]


def test_runs_under_a_class_are_judged_by_its_points(tmp_path):
    """The exact denoiser given a class never leaves itself; beside that of all classes it would from sigma_max on."""
    config = AuditConfig("data:digits8", "digits8", steps=8, count=12, block=8, traced=10, held=99, label="each")
    found = record(audit(config, tmp_path / "run"))["results"]["settling"]
    assert found["leave"]["share"] == 0
    assert found["entropy"]["mean"][0] == pytest.approx(math.log(144), abs=0.1)  # a tenth of 1,437
    points, labels = normal(30, 6, seed=3), torch.arange(30) % 3
    D, wanted = Dataset(points, labels), torch.tensor([0, 2])
    model = package.denoiser.Labelled(D, wanted)
    x = package.noise(D.shape, range(2), 80.0).double()
    run = Trajectory.record(package.trace(model, x, package.schedules.polynomial(12), package.solvers.Heun()))
    assert not float(settling(D, run).gap.max()) < 0.05
    assert float(settling(D, run, labels=wanted).gap.max()) < 1e-9


def test_a_class_is_measured_by_its_own_held_out_points(tmp_path):
    """A class on a line has small ratios without any copy: against held-out points of all it would be guilty."""
    classes = levels_of(get("digits8"), "held out").labels
    config = AuditConfig("data:digits8", "digits8", steps=4, count=4, block=4, traced=0, level=0.05, label=3)
    found = record(audit(config, tmp_path / "run"))["results"]["copies"]
    assert classes is not None
    assert found["held"] == int((classes == 3).sum()) < len(classes)
    with pytest.raises(FanalError, match="none of the 2 held-out points of digits8 is of class 3"):
        audit(dataclasses.replace(config, held=2), tmp_path / "few")

    def drawn(n, seed, share=0.05):
        x = normal(n, 8, seed=seed)
        line = torch.arange(n) < share * n
        x[line, 1:] = 50.0
        return x, line

    exact = Dataset(drawn(2000, 1)[0])
    (held, line), (new, _) = drawn(2000, 2), drawn(100, 3, share=1.0)
    ratio, own = neighbors(exact, held).ratio, neighbors(exact, new).ratio
    assert copied(own, ratio).p < 1e-6
    assert copied(own, ratio[line]).p > 0.01


def test_the_posterior_of_a_class_collapses_where_it_must():
    """Of the points −1 and 1, D = tanh(x/sigma²) and the odds are exp(2x/sigma²); the level is from an ODE solver.

    The second class has the same two points, so the posterior over all points stays undecided between doubles; a class
    of one point was never undecided.
    """
    points, labels = torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.25]).double()[:, None], torch.tensor([0, 0, 1, 1, 2])
    D, wanted = Dataset(points, labels), torch.tensor([0, 0, 1, 1, 2])
    start, sigmas = torch.tensor([30.0, -5.0, 60.0, 0.5, 7.0]).double(), package.schedules.polynomial(300)
    model = package.denoiser.Labelled(D, wanted)
    run = Trajectory.record(package.trace(model, start[:, None], sigmas, package.solvers.Heun()))
    found = settling(D, run, labels=wanted)
    share = optimize.brentq(lambda p: stats.entropy([p, 1 - p]) - COLLAPSED * math.log(2), 1e-9, 0.4)
    odds = math.log((1 - share) / share)
    for b in range(4):
        ode = integrate.solve_ivp(
            lambda sigma, x: (x - np.tanh(x / sigma**2)) / sigma,
            (80.0, 0.05),
            [float(start[b])],
            rtol=1e-10,
            atol=1e-12,
            dense_output=True,
        )
        level = optimize.brentq(lambda sigma, ode=ode: 2 * abs(ode.sol(sigma)[0]) / sigma**2 - odds, 0.05, 80.0)
        assert float(found.collapse[b]) == float(sigmas[sigmas <= level].max())
    assert float(found.collapse[4]) == 80
    assert bool(settling(D, run).collapse[:4].isnan().all())


def test_a_run_from_infinity_settles_at_finite_levels(tmp_path, monkeypatch):
    def prepared(config):
        setup, about = prepare(config)
        sigmas = torch.cat([torch.tensor([math.inf], dtype=torch.float64), setup.sigmas])
        return dataclasses.replace(setup, sigmas=sigmas), about

    monkeypatch.setattr(command, "prepare", prepared)
    config = AuditConfig("data:digits8", "digits8", solver="euler", steps=6, count=4, traced=3, held=99)
    out = audit(config, tmp_path / "run")
    found = record(out)["results"]["settling"]
    assert found["sigmas"][0] == pytest.approx(80)
    assert len(found["gap"]["mean"]) == len(found["sigmas"]) == 6
    assert found["leave"]["share"] == 0


def test_where_a_model_leaves_is_found_by_the_definition():
    """A model that errs at the top only comes back; one that errs from sigma = 1 on stays apart from there."""
    D = Dataset(normal(20, 6, seed=3))
    x, sigmas = package.noise(D.shape, range(5), 80.0).double(), package.schedules.polynomial(24)

    class Erring(package.Denoiser):
        def __init__(self, low, high):
            self.low, self.high = low, high

        def __call__(self, x, sigma):
            return D(x, sigma) + 0.3 * float(self.low <= float(sigma) <= self.high)

    for (low, high), leave, apart in (((20.0, 80.0), 80.0, None), ((0.0, 1.0), 1.0, 1.0)):
        run = Trajectory.record(package.trace(Erring(low, high), x, sigmas, package.solvers.Euler()))
        found = settling(D, run)
        inside = sigmas[:-1][(sigmas[:-1] <= leave)].max()
        assert torch.allclose(found.leave, inside.expand(5))
        assert bool(found.apart.isnan().all()) if apart is None else torch.equal(found.apart, found.leave)


def test_a_level_that_cannot_be_set_leaves_nothing_behind(tmp_path):
    """It is told before any work, so that the next try may use the same place."""
    words = ("audit", "gaussian:digits8", "--data", "digits8", "--steps", 4, "--count", 4, "--traced", 0)
    assert refused(fanal(*words, "--held", 20, "--out", tmp_path / "run"), "99 or more")
    assert list(tmp_path.iterdir()) == []
    assert refused(fanal(*words, "--level", 2, "--out", tmp_path / "run"), "level")
    for bad in ({"held": 0}, {"points": 1}, {"traced": 2000}, {"steps": 1}):
        with pytest.raises(FanalError, match=next(iter(bad))):
            AuditConfig("digits8", "digits8", **bad)


def test_a_stopped_audit_notices_other_data(tmp_path):
    place = tmp_path / "few"
    place.mkdir()
    pixels = (normal(60, 8, 8) * 40 + 128).clamp(0, 255).byte().numpy()
    for i, gray in enumerate(pixels):
        Image.fromarray(gray).save(place / f"{i:03d}.png")
    config = AuditConfig("gaussian:digits8", f"folder:{place}", steps=4, count=6, block=2, traced=0, level=0.2)

    def stops(loop, what):
        for i in loop:
            if what == "samples" and i == 2:
                raise KeyboardInterrupt
            yield i

    with pytest.raises(KeyboardInterrupt):
        audit(config, tmp_path / "run", progress=stops)
    for i, gray in enumerate(pixels):
        Image.fromarray(255 - gray).save(place / f"{i:03d}.png")
    with pytest.raises(FanalError, match="data"):
        audit(config, tmp_path / "run")
    for i, gray in enumerate(pixels):
        Image.fromarray(gray).save(place / f"{i:03d}.png")
    assert record(audit(config, tmp_path / "run"))["results"]["points"] == 48


def test_the_command_tells_and_refuses(tmp_path):
    words = ("audit", "gaussian:digits8", "--data", "digits8", "--steps", 4, "--count", 6, "--traced", 3)
    result = fanal(*words, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "No sign" in result.output
    assert refused(fanal(*words, "--held", 20, "--out", tmp_path / "b"), "99 or more")
    assert refused(fanal("audit", "gaussian:digits8", "--data", "hands32", "--out", tmp_path / "c"), "hands32", "shape")
    few = fanal(*words, "--points", 10, "--out", tmp_path / "few")
    assert "among the first 10 training points, all that were searched, too few" in " ".join(few.output.split())
    assert "the 9 after it" in (tmp_path / "few" / "report.html").read_text(encoding="utf-8")
    (tmp_path / "run" / "report.html").unlink()
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "When runs settle" in page
    assert len(page) < 8e6


def test_typical_levels_have_intervals():
    """By counting: the median of 200 runs of 25 lies in its interval 95 % of the time or more often."""
    inside = 0
    for seed in range(200):
        found = typical(normal(25, seed=seed).exp())
        inside += found["median low"] <= 1 <= found["median high"]
    assert stats.binomtest(inside, 200, 0.95, "less").pvalue > 1e-3
    found = typical(torch.tensor([1.0, 2.0, math.nan, math.nan]))
    assert (found["share"], found["median low"]) == (0.5, None)
    assert found["share low"] == pytest.approx(stats.beta.ppf(0.025, 2, 3))
    nowhere = typical(torch.full((5,), math.nan))
    assert (nowhere["median sigma"], nowhere["share"], nowhere["share high"]) == (None, 0, pytest.approx(0.5218, 1e-3))


def test_the_closest_pairs_are_named(tmp_path):
    """By the files of a folder, and by the rows of a mapped file, which are those that were copied."""
    pixels = get("digits8").data("train", 60).x
    levels = ((pixels + 1) * 127.5).round().byte().numpy()
    (tmp_path / "few").mkdir()
    for i, gray in enumerate(levels):
        Image.fromarray(gray[0]).save(tmp_path / "few" / f"{i:02d}.png")
    np.save(tmp_path / "few.npy", levels)
    named = {
        f"folder:{tmp_path}/few": lambda name: int(name[:2]),
        f"array:{tmp_path}/few.npy": lambda name: int(name[4:]),
    }
    for data, number in named.items():
        spec = data.partition(":")[2]
        config = AuditConfig(f"data:{spec}", data, steps=5, count=10, traced=0, level=0.2, points=20)
        out = audit(config, tmp_path / data[:5])
        x, found = load_file(out / "samples.safetensors")["x"], record(out)["results"]["closest"]
        assert len(found) == 10
        for pair in found:
            if pair["ratio"] < 0.05:
                assert float((x[pair["sample"]] - pixels[number(pair["name"])]).abs().max()) < 0.02
        assert sum(pair["ratio"] < 0.05 for pair in found) > 1
