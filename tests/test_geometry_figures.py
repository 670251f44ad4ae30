"""What figures of trajectories are drawn from, by closed forms: rebuilt states, shares, speeds, distances from data."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

import fanal as package
from fanal import geometry
from fanal.denoiser import network_of
from fanal.errors import FanalError
from fanal.exact import Dataset, Gaussian
from fanal.geometry import command
from fanal.geometry.command import GeometryConfig
from fanal.geometry.command import geometry as measure
from fanal.geometry.measures import speed
from fanal.metrics import Statistics, fid
from fanal.metrics.features import Pixels
from fanal.report.geometry import geometry_page
from fanal.solvers import Euler, Heun
from fanal.trajectory import Trajectory
from toys import record

GRID = package.schedules.polynomial(12)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def law():
    return Gaussian(normal(9, seed=1), torch.linspace(0.1, 3, 9, dtype=torch.float64) ** 2)


def exact_run(law, sigmas, count=3):
    x = float(sigmas[0]) * normal(count, *law.shape, seed=2)
    path = geometry.exact_path(law, x, sigmas)
    return Trajectory(sigmas, path, torch.stack([law(x, s) for x, s in zip(path[:-1], sigmas[:-1], strict=True)]))


def test_rebuilt_paths_are_those_of_plain_linear_algebra():
    path = normal(9, 3, 5, 4, seed=2).cumsum(0)
    found, error = geometry.reconstruct(path, 5), geometry.project(path, 4).error
    assert found.shape == (5, *path.shape)
    off = (found - path).flatten(3).norm(dim=3)
    assert torch.allclose(off, error, atol=1e-6)
    for b in range(3):
        rows = path[:, b].flatten(1) - path[0, b].flatten()
        unit = rows[-1] / rows[-1].norm()
        chord = (rows @ unit)[:, None] * unit
        rest = rows - chord
        u, s, vh = torch.linalg.svd(rest - rest.mean(0), full_matrices=False)
        for k in range(4):
            back = chord + (rest.mean(0) + (u[:, :k] * s[:k]) @ vh[:k] if k else 0) + path[0, b].flatten()
            assert torch.allclose(found[k, :, b].flatten(1), back, atol=1e-9), k
    assert torch.allclose(found[0, [0, -1]], path[[0, -1]])  # the chord begins and ends where the path does
    flat = normal(7, 2, 2, seed=3).cumsum(0)  # the plane has one component off the chord
    assert torch.allclose(geometry.reconstruct(flat, 2)[1], flat, atol=1e-9)
    with pytest.raises(FanalError, match=r"\[1, 9\]"):
        geometry.reconstruct(path, 10)


def test_errors_in_few_dimensions_converge_to_those_of_the_exact_trajectory(law):
    """[REG] fig. 4(b) of Gaussian data, step by step, at Euler's order."""
    x, far = 80 * normal(3, 9, seed=4), []
    for steps in (40, 80):
        sigmas = package.schedules.polynomial(steps, zero=False)
        found = geometry.measure(Trajectory.record(package.trace(law, x, sigmas, Euler()))).curves
        truth = geometry.project(geometry.exact_path(law, x, sigmas), 5).error
        told = torch.stack([found[f"error in {k}-D"] for k in range(1, 7)])
        assert torch.equal(told[0], found["deviation"])
        assert bool((told[1:].mean(1) <= told[:-1].mean(1) + 1e-9).all())
        far.append(float((told - truth)[:3].abs().max()))
    assert math.log2(far[0] / far[1]) == pytest.approx(1, abs=0.3)


def test_the_speed_of_a_gaussians_trajectory_has_a_closed_form(law):
    """`‖dx/dsigma‖² = Σ_k c_k²·sigma²/((λ_k + sigma²)(λ_k + sigma_T²))`, c the start from the mean."""
    sigmas = package.schedules.polynomial(20)
    run = exact_run(law, sigmas)
    along, values = law.cov.coordinates(run.x[0] - law.mean), law.cov.values
    level = sigmas[:-1, None] ** 2
    rate = level / ((values + level) * (values + sigmas[0] ** 2))
    assert torch.allclose(speed(run), (rate @ along.square().T / 9).sqrt(), atol=1e-10)


def test_the_exact_slope_is_that_of_the_exact_trajectory():
    """Of one point, which pulls evenly: the distance that is left over sigma; of many, as `measure` has it."""
    x = 80 * normal(4, 5, seed=3)
    one, many = Dataset(normal(1, 5)), Dataset(normal(30, 5, seed=2))
    run = Trajectory.record(package.trace(many, x, GRID, Heun()))
    told = geometry.diagnose(many, one, run, Heun()).curves["exact slope"]
    want = (x - one.points.block(slice(0, 1), torch.float64)).norm(dim=1) / (80 * math.sqrt(5))
    assert torch.allclose(told, want.expand(12, 4), rtol=1e-9)
    told = geometry.diagnose(one, many, run, Heun()).curves["exact slope"]
    assert torch.allclose(told, geometry.measure(run).curves["slope"])


def test_weights_of_points_are_those_of_their_class():
    points, labels = normal(40, 3), torch.arange(40) % 4
    data, x, wanted = Dataset(points, labels, block=7), normal(5, 3, seed=1), torch.tensor([0, 3, 1, 4, 2])
    weight, index = data.top(x, 0.7, 12, wanted)
    for b, label in enumerate(wanted.tolist()):
        own = torch.arange(40) if label == 4 else torch.arange(40)[labels == label]
        known, order = Dataset(points[own]).weights(x[b : b + 1], 0.7)[0].sort(descending=True)
        count = min(12, len(own))
        assert torch.allclose(weight[b, :count], known[:count], atol=1e-10)
        assert torch.equal(index[b, :count], own[order[:count]])
        assert float(weight[b, count:].sum()) == 0


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    config = GeometryConfig("gaussian:digits8", steps=10, count=6, drawn=5, block=4, data="digits8", points=70)
    return measure(config, tmp_path_factory.mktemp("figures") / "digits")


def test_predictions_at_rebuilt_states_are_those_of_the_closed_form(digits):
    """A Gaussian's prediction is affine: off by `λ/(λ + sigma²)` of the state's own error along each eigenvector."""
    model = network_of(package.load("gaussian:digits8"))
    x = package.noise(model.shape, range(5), 80.0)
    sigmas = package.schedules.polynomial(10)
    run = Trajectory.record(package.trace(model, x, sigmas, Euler()))
    kept = load_file(digits / "geometry.safetensors")
    states = geometry.reconstruct(run.x, 3)[:, :-1]
    off = model.cov.coordinates((states - run.x[:-1]).double().flatten(3))
    off = off * (model.cov.values / (model.cov.values + sigmas[:-1, None, None] ** 2))
    want = off.norm(dim=3).permute(2, 0, 1) / 8
    assert kept["rebuilt_error"].shape == (5, 3, 10)
    assert torch.allclose(kept["rebuilt_error"], want, rtol=1e-2, atol=1e-4)
    for k in range(3):
        told = torch.stack([model(x, sigma) for x, sigma in zip(states[k], sigmas[:-1], strict=True)], 1)
        shown = ((told.clamp(-1, 1) + 1) * 127.5).round()[:, :, 0]
        assert float((kept[f"strip_{k + 1}-D"][..., 0] - shown).abs().max()) <= 1


def test_pictures_of_the_forward_process_and_of_the_exact_run_are_kept(digits):
    kept = load_file(digits / "geometry.safetensors")
    for name in ("strip_forward", "strip_exact x", "strip_D*(exact x)"):
        assert kept[name].shape == kept["strip"].shape == (5, 10, 8, 8, 1), name
    apart = (kept["strip_forward"][:, -1].int() - kept["strip"][:, -1].int()).abs()
    assert int(apart.max()) <= 3  # at sigma_min the forward process is the sample


def test_the_plane_keeps_its_coordinates(tmp_path):
    folder = measure(GeometryConfig("mixture:ring8", steps=9, count=3, drawn=2, block=1), tmp_path / "run")
    kept = load_file(folder / "geometry.safetensors")
    model = package.load("mixture:ring8")
    run = Trajectory.record(package.trace(model, package.noise((2,), range(2), 80.0), package.schedules.polynomial(9),
                                          Euler()))  # fmt: skip
    assert torch.allclose(kept["rebuilt"][:, 0], run.denoised.transpose(0, 1), atol=1e-5)
    assert torch.allclose(kept["rebuilt"][:, 2], kept["rebuilt"][:, 0], atol=1e-3)  # two dimensions are all
    assert float(kept["rebuilt_error"][:, 0].max()) > 10 * float(kept["rebuilt_error"][:, 1].max())


PLANE = {"steps": 8, "count": 400, "drawn": 3, "data": "grid2", "points": 500}


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    return measure(GeometryConfig("gaussian:grid2", block=64, **PLANE), tmp_path_factory.mktemp("plane") / "run")


def test_distances_from_the_data_are_those_of_the_laws_of_a_gaussian_run(plane):
    """Euler's steps are affine, so states and predictions are Gaussian; Bures' distance of their laws, to 5 errors."""
    told, model = record(plane)["results"]["frechet"], network_of(package.load("gaussian:grid2"))
    real = Statistics.of(package.datasets.get("grid2").data("train", 500).x)
    values = model.cov.values
    basis = torch.eye(2, dtype=torch.float64) if model.cov.basis is None else model.cov.basis
    shift, scale = torch.zeros(2, dtype=torch.float64), torch.full((2,), 80.0, dtype=torch.float64)
    sigmas, center = record(plane)["results"]["sigmas"], basis.T @ model.mean
    for i, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        share = values / (values + sigma**2)
        pairs = {"states": (shift, scale), "predictions": (center + share * (shift - center), share * scale)}
        for name, (mean, spread) in pairs.items():
            law = Statistics(basis @ mean, basis @ torch.diag(spread**2) @ basis.T, None)
            got = told[name][i]
            assert abs(got["value"] - fid(law, real).value) < 5 * got["se"] + 0.01 * got["value"], (name, sigma)
        ratio = after / sigma
        shift = ratio * shift + (1 - ratio) * pairs["predictions"][0]
        scale = (ratio + (1 - ratio) * share) * scale
    assert (told["n"], told["n_real"], told["features"]) == (400, 500, "pixels")
    assert told["sigmas"] == pytest.approx(sigmas[:-1])


def test_figures_are_the_same_for_any_blocks_and_when_resumed(plane, tmp_path, monkeypatch):
    """Broken off after two blocks of 150: the same command goes on, and finds what one without a break does."""
    config, seen = GeometryConfig("gaussian:grid2", block=150, **PLANE), []
    own = command.measured_block

    def breaking(setup, exact, rows, *more):
        seen.append(rows)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return own(setup, exact, rows, *more)

    monkeypatch.setattr(command, "measured_block", breaking)
    with pytest.raises(KeyboardInterrupt):
        measure(config, tmp_path / "run")
    again = measure(config, tmp_path / "run")
    assert seen == [range(150), range(150, 300), range(300, 400), range(300, 400)]
    a, b = record(plane)["results"], record(again)["results"]
    for name in ("states", "predictions"):
        for one, other in zip(a["frechet"][name], b["frechet"][name], strict=True):
            assert one["value"] == pytest.approx(other["value"], rel=1e-5, abs=1e-7)
            assert one["se"] == pytest.approx(other["se"], rel=1e-4, abs=1e-7)
    for name in ("error in 1-D", "error in 2-D", "exact slope"):
        for part in ("mean", "std"):
            assert a["bands"][name][part] == pytest.approx(b["bands"][name][part], rel=1e-4, abs=1e-4), name
    one, other = (load_file(folder / "geometry.safetensors") for folder in (plane, again))
    for name in ("rebuilt", "rebuilt_error", "point_weights"):
        assert torch.allclose(one[name], other[name], atol=1e-4), name


def test_features_of_the_data_are_the_runs_own_work(tmp_path, monkeypatch):
    """After the folder is there: in blocks with progress, on the run's threads, and read again when resumed."""
    config, told, sizes, alone = GeometryConfig("gaussian:grid2", threads=2, **PLANE), [], [], []

    def progress(loop, what):
        told.append(what)
        return loop

    def extract(self, x):
        sizes.append(len(x))
        if torch.get_num_threads() == 1:
            alone.append(len(x))
        return own(self, x)

    def breaking(*args):
        raise KeyboardInterrupt

    own, before = Pixels.__call__, torch.get_num_threads()
    torch.set_num_threads(1)
    with monkeypatch.context() as patch:
        patch.setattr(command, "results_of", breaking)
        with pytest.raises(KeyboardInterrupt):
            measure(config, tmp_path / "run", progress=progress)
    assert told == ["trajectories", "features of the data"]
    monkeypatch.setattr(Pixels, "__call__", extract)
    folder = measure(config, tmp_path / "run")
    assert sizes == [1]  # which tells how many features there are
    assert record(folder)["results"]["frechet"]["n_real"] == 500
    with pytest.raises(FanalError, match="overwrite"):
        measure(config, tmp_path / "run")
    assert sizes == [1, 1]
    measure(config, tmp_path / "again")
    torch.set_num_threads(before)
    assert (sum(sizes), alone) == (3 + 500 + 2 * 8 * 400, [1, 1, 1])


def test_weights_follow_single_points_along_a_run(digits):
    """[REG] fig. 9(e): of the points that are heaviest at some level, by all weights at all states; some fall again."""
    kept, data = load_file(digits / "geometry.safetensors"), package.datasets.get("digits8").data("train", 70).x
    model, exact = network_of(package.load("gaussian:digits8")), Dataset(data)
    x = package.noise(model.shape, range(5), 80.0)
    run = Trajectory.record(package.trace(model, x, package.schedules.polynomial(10), Euler()))
    pairs = zip(run.x[:-1].double(), run.sigmas[:-1], strict=True)
    every = torch.stack([exact.weights(x, sigma) for x, sigma in pairs], 1)  # (B, N, points)
    peaks, order = every.amax(1).sort(descending=True)
    index, told = kept["point_index"], kept["point_weights"]
    assert index.shape == (5, 5)
    for b in range(5):
        assert every[b].amax(0)[index[b]].tolist() == pytest.approx(peaks[b, :5].tolist(), rel=1e-4)
        assert torch.allclose(told[b], every[b][:, index[b]], rtol=1e-3, atol=1e-6)
    assert torch.equal(index[:, 0], order[:, 0])
    assert bool((told[:, -1] < 0.1 * told.amax(1)).any())  # which sorting at each level would hide


def test_too_few_samples_for_a_covariance_are_not_compared(digits):
    assert "frechet" not in record(digits)["results"]


def test_a_run_of_one_class_is_compared_with_its_points(tmp_path):
    config = GeometryConfig(
        "data:digits8,count=900", steps=6, count=70, drawn=2, window=2, data="digits8", points=900, label=3
    )
    folder = measure(config, tmp_path / "run")
    told = record(folder)["results"]["frechet"]
    own = int((package.datasets.get("digits8").data("train", 900).labels == 3).sum())
    assert (told["n"], told["n_real"], told["features"]) == (70, own, "fanal-features32")
    # an exact denoiser's samples are points of the class, drawn again: nearer than its noise by far
    assert told["states"][-1]["value"] < 0.1 * told["states"][0]["value"]
    weights = load_file(folder / "geometry.safetensors")["point_weights"]
    assert torch.allclose(weights[:, 0], torch.full((2, 5), 1 / own).double(), rtol=0.5)
    assert float(weights[:, -1, 0].min()) > 0.9


def drawn(folder):
    page = geometry_page(folder, record(folder))
    return {figure.name: figure.drawings for figure in page.figures}, {table.name: table for table in page.tables}


def test_the_page_draws_what_was_measured(plane, digits):
    figures, tables = drawn(plane)
    told = record(plane)["results"]
    for line, name in zip(figures["frechet"][0].lines, ("predictions", "states"), strict=True):
        assert (line.name, list(line.x)) == (name, pytest.approx(told["frechet"]["sigmas"], rel=1e-5))
        assert list(line.y) == pytest.approx([each["value"] for each in told["frechet"][name]], rel=1e-5)
    assert len(tables["frechet-distances"].rows) == 8
    model, exact = figures["slope"][0].lines
    assert list(exact.y) == pytest.approx(told["bands"]["exact slope"]["mean"], rel=1e-5)
    assert (model.name, exact.name) == ("model", "exact")
    states, predictions = figures["reconstruction-steps"]
    assert [line.name for line in states.lines] == [line.name for line in predictions.lines] == ["1-D"]
    assert [line.name for line in figures["rebuilt"][0].lines] == 3 * ["the run's", "1-D"]
    figures, _ = drawn(digits)
    states, predictions = figures["reconstruction-steps"]
    bands, kept = record(digits)["results"]["bands"], load_file(digits / "geometry.safetensors")
    for k, line in enumerate(states.lines):
        assert set(line.y) <= {float(f"{value:.6g}") for value in bands[f"error in {k + 1}-D"]["mean"]}
    means = kept["rebuilt_error"].mean(0)
    for line, row in zip(predictions.lines, means, strict=True):
        assert list(line.y) == pytest.approx(row[row > 1e-5 * means.max()].tolist(), rel=1e-5)
    assert float(predictions.lines[0].x[0]) < 80  # the chord begins where the run does
    (film,) = figures["rebuilt"]
    assert list(film.layers) == ["the run's", "rebuilt in 1-D", "rebuilt in 2-D", "rebuilt in 3-D"]
