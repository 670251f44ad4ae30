"""`fanal geometry`: its figures are those of the trajectories, for any block, and its page draws them."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

import fanal as package
from fanal import geometry
from fanal.denoiser import network_of
from fanal.errors import FanalError
from fanal.exact import Gaussian
from fanal.geometry import command
from fanal.geometry.command import GeometryConfig
from fanal.geometry.command import geometry as measure
from fanal.report import write_report
from fanal.trajectory import Trajectory
from toys import Toy, fanal, record, refused

STEPS, COUNT = 16, 12


def spoiled():
    """A network that failed to learn the levels about sigma = 2."""
    return Toy(lambda x, sigma, denoised: denoised + 2.0 * (1.8 < float(sigma) < 2.2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Trajectories of the digits' Gaussian, beside the exact denoiser of some digits."""
    out = tmp_path_factory.mktemp("geometry") / "run"
    config = GeometryConfig("gaussian:digits8", steps=STEPS, count=COUNT, drawn=4, block=5, data="digits8", points=90)
    return measure(config, out)


@pytest.fixture(scope="module")
def run():
    model = package.load("gaussian:digits8")
    x = package.noise(model.shape, range(COUNT), 80.0)
    return Trajectory.record(package.trace(model, x, package.schedules.polynomial(STEPS), package.solvers.Euler()))


def test_bands_are_those_of_all_trajectories_together(folder, run):
    bands = record(folder)["results"]["bands"]
    for name, values in geometry.measure(run).curves.items():
        whole = geometry.Band.of(values)
        for part in ("mean", "std", "low", "high"):
            got = torch.tensor(bands[name][part], dtype=torch.float64)
            assert torch.allclose(got, getattr(whole, part), rtol=1e-4, atol=1e-5), (name, part)
    beside = {"score deviation", "score deviation on exact path", "model x", "exact x", "D(exact x)", "D*(model x)"}
    beside |= {"apart", "entropy", "log density", "forward magnitude", "exact slope", "d1 / d2"}
    assert set(bands) == set(geometry.measure(run).curves) | beside


def test_numbers_are_means_over_trajectories(folder, run):
    told = record(folder)["results"]
    found, length = geometry.project(run.x, 5), geometry.length(run.x)[-1]
    numbers = told["numbers"]
    assert numbers["explained by 2"]["value"] == pytest.approx(float(found.explained[:, :2].sum(1).mean()), rel=1e-5)
    assert numbers["mean error in 3-D"]["value"] == pytest.approx(float(found.error[2].mean()), rel=1e-3, abs=1e-5)
    assert numbers["length / (sigma_max sqrt d)"]["value"] == pytest.approx(float(length.mean()) / (80 * 8), rel=1e-5)
    # asked at its own states, at those of the exact denoiser's run, and four at states rebuilt in 1, 2 and 3 dimensions
    calls, evaluations = (2 * 3 + 3) * STEPS, (2 * COUNT + 3 * 4) * STEPS
    assert record(folder)["network"] == {"calls": calls, "evaluations": evaluations}


def _exact_deviation(x, sigmas):
    """Of the digits' Gaussian, whose trajectories have a closed form."""
    return geometry.deviation(geometry.exact_path(network_of(package.load("gaussian:digits8")), x, sigmas))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_command_agrees_with_the_exact_solution_at_the_solvers_order(tmp_path, solver, order):
    """`gaussian:SET`: mean deviations of the run folder against [REG] eq. 23, at two numbers of steps."""
    errors = []
    for steps in (20, 40):
        config = GeometryConfig("gaussian:digits8", solver, steps=steps, count=4, drawn=2, zero=False)
        results = record(measure(config, tmp_path / f"{steps}"))["results"]
        sigmas = torch.tensor(results["sigmas"], dtype=torch.float64)
        truth = _exact_deviation(package.noise((1, 8, 8), range(4), 80.0).double(), sigmas).mean(1)
        told = torch.tensor(results["bands"]["deviation"]["mean"], dtype=torch.float64)
        errors.append(float((told - truth).abs().max()))
        assert errors[-1] < 0.25 * float(truth.max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


def test_the_command_agrees_with_an_adaptive_solver_on_a_mixture(tmp_path):
    """`mixture:NAME` against scipy's DOP853 on the exact denoiser: mean distances, at Euler's order."""
    from scipy.integrate import solve_ivp

    D, count = package.load("mixture:ring8"), 4
    x = package.noise((2,), range(count), 80.0).double()
    errors = []
    for steps in (80, 160):
        config = GeometryConfig("mixture:ring8", steps=steps, count=count, drawn=2, zero=False)
        results = record(measure(config, tmp_path / f"{steps}"))["results"]
        sigmas = torch.tensor(results["sigmas"], dtype=torch.float64)

        def slope(sigma, flat):
            state = torch.from_numpy(flat.reshape(count, 2))
            return ((state - D(state, torch.tensor(sigma))) / sigma).numpy().ravel()

        ends = sigmas.numpy()
        found = solve_ivp(slope, (ends[0], ends[-1]), x.numpy().ravel(), "DOP853", t_eval=ends, rtol=1e-7, atol=1e-7)
        path = torch.from_numpy(found.y.T.reshape(len(ends), count, 2))
        told = torch.tensor(results["bands"]["distance"]["mean"], dtype=torch.float64)
        errors.append(float((told - geometry.distance(path).mean(1)).abs().max()))
    assert errors[-1] < 0.1
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.3)


def test_a_class_that_the_points_lack_is_named(tmp_path):
    labels = package.datasets.get("digits8").data("train", 5).labels
    lacking = min(set(range(10)) - set(labels.tolist()))
    for label in {lacking, 9}:
        config = GeometryConfig("digits8", steps=6, count=2, drawn=2, data="digits8", points=5, label=label)
        with pytest.raises(FanalError, match=f"class {label} has no point among these 5: take more, as with --points"):
            measure(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_drawn_curves_are_the_first_ones(folder, run):
    drawn = load_file(folder / "geometry.safetensors")
    mine, _, _ = geometry.align(geometry.project(run.x[:, :4], 2).coordinates)
    assert torch.allclose(drawn["aligned"], mine, atol=1e-2)
    assert drawn["curvature"].shape == (4, STEPS + 1)


def test_rebuilt_residuals_are_those_of_the_drawn_curves(folder):
    """By scipy's rotations; a mirrored curve has the same residual, with its own torsion."""
    from scipy.spatial.transform import Rotation

    told, left = record(folder)["results"]["shape"], []
    for own in load_file(folder / "geometry.safetensors")["aligned"].double():
        found = geometry.frenet(own[None])
        again = geometry.rebuild(found.length[0], found.curvature[0], found.torsion[0])
        own = own - own.mean(0)
        off = Rotation.align_vectors(own.numpy(), (again - again.mean(0)).numpy())[1]
        left.append([float(off / own.norm()), float(off / own[:, 1:].norm())])
    whole, across = torch.tensor(left).mean(0).tolist()
    assert told["rebuilt residual / size"]["value"] == pytest.approx(whole, rel=1e-3)
    assert told["rebuilt residual / size across"]["value"] == pytest.approx(across, rel=1e-3)
    assert across > 20 * whole  # most of a curve's size is its chord


def test_the_exact_denoiser_stands_beside_the_model(folder, tmp_path):
    """A `data:` model has no score deviation; the digits' Gaussian has, and none where both are the mean."""
    own = GeometryConfig("data:digits8,count=90", steps=8, count=4, drawn=2, window=2, data="digits8", points=90)
    bands = record(measure(own, tmp_path / "own"))["results"]["bands"]
    assert max(bands["score deviation"]["high"]) < 1e-4
    entropy = bands["entropy"]["mean"]
    assert entropy[0] == pytest.approx(math.log(90), rel=0.01)
    assert entropy[-1] < 0.01
    told = record(folder)["results"]
    other = told["bands"]["score deviation"]["mean"]
    assert other[0] < 0.1 < max(other)
    assert set(told["likelihood"]) == {"met", "state", "prediction", "steps", "state steps", "prediction steps"}
    assert told["likelihood"]["met"]["value"] == pytest.approx(sum(told["likelihood"]["steps"]) / STEPS)
    assert told["flagged"] == []
    shell = told["bands"]["forward magnitude"]["mean"]
    assert shell[0] == pytest.approx(80 * 8, rel=1e-2)
    assert shell[-1] == pytest.approx(told["bands"]["magnitude"]["mean"][-1], rel=0.2)
    assert told["numbers"]["exact end to nearest point / sqrt d"]["value"] < 1e-4


def test_weights_are_those_of_the_grid(folder, run):
    told = record(folder)["results"]["weights"]
    assert told["start"] + sum(told["prediction"]) == pytest.approx(1)
    parts = torch.einsum("m,mb...->b...", torch.tensor(told["prediction"]), run.denoised[:-1])
    assert torch.allclose(told["start"] * run.x[0] + parts, run.x[-2], atol=1e-3)


def test_a_level_that_the_model_failed_to_learn_is_flagged(tmp_path):
    own = "python:test_geometry_command:spoiled"
    config = GeometryConfig(own, steps=30, count=4, drawn=2, data="grid2", points=200)
    flagged = record(measure(config, tmp_path / "run"))["results"]["flagged"]
    assert [1.8 < each["sigma"] < 2.2 for each in flagged] == [True]
    assert flagged[0]["deviation"] > 2 * flagged[0]["usual"]


def test_models_and_finished_runs_and_classes_are_compared(tmp_path):
    shared = {"steps": 8, "count": 6, "drawn": 6, "block": 4}
    one = measure(GeometryConfig("gaussian:digits8", **shared), tmp_path / "one")
    again = GeometryConfig("gaussian:digits8", against=("mixture:ring8", str(one)), seed=1, **shared)
    told = record(measure(again, tmp_path / "two"))
    found = told["results"]["regularity"]
    assert found["names"] == ["gaussian:digits8", "mixture:ring8", str(one)]
    table = torch.tensor(found["procrustes"], dtype=torch.float64)
    assert torch.allclose(table, table.T)
    assert table[0, 2] == pytest.approx(float(table[0, 0]), abs=0.1)  # one model, other noise
    assert table[0, 1] > table[0, 0] + 0.1
    assert table[2, 2] == pytest.approx(record(one)["results"]["regularity"]["procrustes"][0][0])
    assert set(found["nulls"]) == {"smooth", "forward"}
    assert told["network"]["evaluations"] == 2 * 6 * 8 + 3 * 6 * 8
    classes = GeometryConfig("data:digits8,count=90", label="each", **(shared | {"count": 20, "drawn": 20}))
    own = record(measure(classes, tmp_path / "classes"))["results"]
    assert own["regularity"]["names"] == [f"data:digits8,count=90 {c}" for c in range(10)]
    assert own["groups"][13] == "data:digits8,count=90 3"
    with pytest.raises(FanalError, match="given once"):
        GeometryConfig("mixture:ring8", against=("mixture:ring8",))
    without = GeometryConfig("data:digits8,count=90", label="each", against=("gaussian:digits8",), **shared)
    with pytest.raises(FanalError, match="takes no class labels.*into a run folder, and give that folder"):
        measure(without, tmp_path / "four")
    other = GeometryConfig("gaussian:digits8", against=(str(one),), **(shared | {"steps": 9}))
    with pytest.raises(FanalError, match="other levels"):
        measure(other, tmp_path / "three")


def test_trajectories_begin_at_encoded_images(tmp_path):
    """Encoded finely, then run down again: they end at the images that they began as."""
    codes = tmp_path / "codes"
    words = ("encode", "gaussian:digits8", "--data", "digits8", "--count", 4, "--steps", 80, "--out", codes)
    assert fanal(*words).exit_code == 0
    config = GeometryConfig("gaussian:digits8", "heun", steps=60, count=4, drawn=2, noise=f"{codes}/noise.safetensors")
    told = record(measure(config, tmp_path / "run"))["results"]
    kept = load_file(codes / "noise.safetensors")
    assert told["numbers"]["end to encoded image / sqrt d"]["value"] < 0.02
    assert told["bands"]["magnitude"]["mean"][0] == pytest.approx(
        80 * float(kept["noise"].flatten(1).norm(dim=1).mean()), rel=1e-5
    )


def test_trajectories_begin_at_noised_images(tmp_path):
    """With little noise the exact denoiser leads back to each image, with much it forgets them."""
    shared = {"steps": 8, "count": 6, "drawn": 4, "block": 4, "window": 2, "images": "digits8"}
    x, ends = package.datasets.get("digits8").data("train", 6).x, {}
    for sigma in (0.05, 80.0):
        config = GeometryConfig("data:digits8,count=90", sigma_max=sigma, **shared)
        folder = measure(config, tmp_path / f"{sigma}")
        told, kept = record(folder)["results"], load_file(folder / "geometry.safetensors")
        ends[sigma] = told["numbers"]["end to noised image / sqrt d"]["value"]
        start = x + sigma * package.noise((1, 8, 8), range(6))
        want = float(start.flatten(1).norm(dim=1).mean())
        assert told["bands"]["magnitude"]["mean"][0] == pytest.approx(want, rel=1e-5)
        assert torch.equal(kept["strip_forward"][:, 0], kept["strip_x"][:, 0])  # both are the start
        clean = ((x[:4, 0].clamp(-1, 1) + 1) * 127.5).round()
        assert float((kept["strip_forward"][:, -1, :, :, 0] - clean).abs().max()) <= 2
    assert ends[0.05] < 1e-3
    assert ends[80.0] > 0.1
    page = (tmp_path / "80.0" / "report.html").read_text(encoding="utf-8")
    assert "noise added to the image" in page
    assert "end to noised image / sqrt d" in page
    with pytest.raises(FanalError, match="one of noise and images"):
        GeometryConfig("digits8", noise="codes", images="digits8")
    many = GeometryConfig("gaussian:digits8", images="digits8", count=100_000)
    with pytest.raises(FanalError, match="100000 are wanted: lower --count"):
        measure(many, tmp_path / "many")
    with pytest.raises(FanalError, match="shape"):
        measure(GeometryConfig("mixture:ring8", images="digits8", count=2, drawn=2), tmp_path / "other")


def test_strips_show_predictions_and_states(folder, run):
    drawn = load_file(folder / "geometry.safetensors")
    assert drawn["strip"].shape == (4, STEPS, 8, 8, 1)
    assert drawn["strip_x"].shape == drawn["strip_D(exact x)"].shape == drawn["strip"].shape
    last = ((run.x[-1, :4].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert int((drawn["strip"][:, -1, :, :, 0].int() - last[:, 0].int()).abs().max()) <= 1
    assert drawn["strip_sigmas"].tolist() == pytest.approx(record(folder)["results"]["sigmas"][:-1])
    assert drawn["neighbors"].shape == (4, 2, 5, 8, 8, 1)
    weights = drawn["point_weights"]
    assert weights.shape == (4, STEPS, 5)
    assert torch.allclose(weights[:, 0], torch.full((4, 5), 1 / 90).double(), rtol=0.5)
    assert float(weights[:, -1, 0].min()) > 0.9


def test_trajectories_under_a_class_stand_beside_its_points(tmp_path):
    shared = {"steps": 8, "drawn": 2, "window": 2, "data": "digits8", "block": 3}
    own = GeometryConfig("data:digits8,count=90", count=6, points=90, label="each", **shared)
    results = record(measure(own, tmp_path / "own"))["results"]
    assert max(results["bands"]["score deviation"]["high"]) < 1e-4
    assert results["bands"]["entropy"]["high"][0] < math.log(20)  # about nine of each class
    assert results["numbers"]["stage.entropy.first"]["value"] < 40
    few = GeometryConfig("data:digits8", count=2, points=2, label=3, **shared)
    with pytest.raises(FanalError, match="class 3"):
        measure(few, tmp_path / "few")


def test_blocks_change_nothing_but_rounding(folder, tmp_path):
    whole = GeometryConfig("gaussian:digits8", steps=STEPS, count=COUNT, drawn=4, data="digits8", points=90)
    a, b = record(folder)["results"], record(measure(whole, tmp_path / "whole"))["results"]
    for name, value in a["numbers"].items():
        assert value["value"] == pytest.approx(b["numbers"][name]["value"], rel=1e-4, abs=1e-5), name
    assert set(a["bands"]) == set(b["bands"])
    for name, band in a["bands"].items():
        for part in ("mean", "std", "low", "high"):
            assert band[part] == pytest.approx(b["bands"][name][part], rel=1e-3, abs=2e-4), (name, part)
    for name, value in a["likelihood"].items():
        other = b["likelihood"][name]
        assert value == pytest.approx(other, abs=1e-12), name


def test_stages_are_found_where_they_were_put():
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])
    bend = torch.tensor([[0.0, 0.0], [0.2, 0.0], [1.0, 0.0], [0.3, 0.0], [0.05, 0.0]])
    found = geometry.by_curvature(bend, sigmas)
    assert found.first.tolist()[0] == 4
    assert found.last.tolist()[0] == 1
    assert bool(found.first[1].isnan())
    entropy = math.log(100) * torch.tensor([[1.0], [0.97], [0.6], [0.1], [0.0]])
    found = geometry.by_entropy(entropy, sigmas, math.log(100))
    assert (float(found.first), float(found.last)) == (2, 1)
    with pytest.raises(FanalError, match="share"):
        geometry.by_curvature(bend, sigmas, 1.0)
    with pytest.raises(FanalError, match="each of 5 levels"):
        geometry.by_entropy(entropy[:3], sigmas, 1.0)


def test_the_command_prints_and_refuses(tmp_path):
    out = tmp_path / "run"
    words = (*"geometry mixture:ring8 --steps 6 --window 2 --count 3 --against mixture:grid2 --out".split(), out)
    result = fanal(*words)
    assert result.exit_code == 0, result.output
    assert "largest deviation / chord" in result.output
    assert "mixture:grid2" in result.output
    assert "chance: noise paths" in result.output
    assert refused(fanal(*words), "overwrite")
    assert refused(fanal("geometry", "mixture:ring8", "--steps", 6, "--window", 4, "--out", tmp_path / "b"), "window")
    windows = {6: 3, 100: 5, 119: 5, 120: 6, 1000: 50}
    assert {steps: GeometryConfig("mixture:ring8", steps=steps).window for steps in windows} == windows
    with pytest.raises(FanalError, match="steps must be at least 5"):
        GeometryConfig("mixture:ring8", steps=4, window=2)
    wrong = fanal("geometry", "mixture:ring8", "--data", "digits8", "--out", tmp_path / "c")
    assert refused(wrong, "digits8", "shape")
    (out / "report.html").unlink()
    assert write_report(out).is_file()


def on_a_line():
    return Gaussian(torch.zeros(1), torch.ones(1))


def test_samples_of_one_number_are_refused_before_they_are_run(tmp_path, monkeypatch):
    line, said = f"python:{__name__}:on_a_line", "one number each.*such as mixture:ring8"
    monkeypatch.setattr(command, "measured_block", lambda *rest: pytest.fail("it was run"))
    with pytest.raises(FanalError, match=said):
        measure(GeometryConfig(line, steps=6, count=2, drawn=2, sigma_min=0.1, sigma_max=9.0), tmp_path / "a")
    with pytest.raises(FanalError, match=f"on_a_line have {said}"):
        measure(GeometryConfig("mixture:ring8", steps=6, count=2, drawn=2, against=(line,)), tmp_path / "b")
    assert not any(tmp_path.iterdir())


@pytest.mark.browser
def test_the_page_opens_offline_and_small_screens_need_no_scrolling(browser, folder):
    assert (folder / "report.html").stat().st_size < 8e6
    page = browser.new_page(viewport={"width": 360, "height": 800}, color_scheme="dark")
    page.set_default_timeout(120_000)  # megabytes of drawing code, on a machine that may be busy
    told, asked = [], []
    page.on("console", lambda m: told.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((folder / "report.html").absolute().as_uri(), wait_until="load")
    page.wait_for_selector("#entropy .main-svg")
    assert told == []
    assert all(url.startswith(("data:", "blob:")) for url in asked[1:])
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 25, 31)"
    assert page.evaluate("document.querySelector('#boomerang').data.length") == 4
    page.close()
