"""What a geometry run says in words: true of laws whose trajectories are known, and other words for other figures."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fanal.exact import Gaussian
from fanal.geometry.command import GeometryConfig
from fanal.geometry.command import geometry as measure
from fanal.metrics import Estimate
from fanal.report.geometry.words import sentences, tables
from toys import fanal, record


class Scaled(Gaussian):
    """A Gaussian with few variances: a run is `x_i(sigma) ∝ sqrt(λ_i + sigma²)`, a curve in as many dimensions."""

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, *variances):
        super().__init__(torch.zeros(12), torch.tensor(variances).repeat(12 // len(variances)))


def one_scale():
    return Scaled(1.0)


def two_scales():
    return Scaled(9.0, 0.01)


def three_scales():
    return Scaled(9.0, 0.5, 0.01)


def results(place, model, **settings):
    shared = {"steps": 24, "count": 12, "drawn": 12} | settings
    return record(measure(GeometryConfig(model, **shared), place))["results"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    place, own = tmp_path_factory.mktemp("words"), f"python:{__name__}:"
    return {
        "one": results(place / "one", f"{own}one_scale"),
        "two": results(place / "two", f"{own}two_scales"),
        "three": results(place / "three", f"{own}three_scales"),
        "near": results(place / "near", f"{own}two_scales", sigma_max=2.0),
        "grid": results(
            place / "grid", "mixture:grid2", count=96, data="grid2", points=200, against=("mixture:ring8",)
        ),
    }


def line(results, about):
    (told,) = [each for each in sentences(results) if re.search(about, each)]
    return told


def test_how_straight_and_how_flat_is_told(found):
    assert line(found["one"], "^Trajectories are") == "Trajectories are straight, up to rounding."
    assert not any("dimensions" in each for each in sentences(found["one"]))  # nothing bends
    assert line(found["two"], "dimensions").startswith("2 dimensions hold 99 % of what bends: 1 component beside")
    assert line(found["three"], "dimensions").startswith("3 dimensions hold 99 % of what bends: 2 components beside")
    assert line(found["grid"], "dimensions") == "All that bends lies in 2 dimensions; samples have no more."
    noise = found["three"]["regularity"]["nulls"]["forward"]["explained by 2"]["value"]
    assert f"of noise paths: {100 * noise:.0f}" in line(found["three"], "dimensions")


def test_a_run_from_a_small_sigma_is_called_bent(found):
    """Among points at distance 3, a run from 2 moves as much across as along; from 80 it hardly does."""
    told = [line(found[name], "^Trajectories are") for name in ("three", "near")]
    assert "nearly straight: at their farthest they are 0.9" in told[0]
    assert "slightly bent: at their farthest they are 3." in told[1]


def changed(results, *path, value):
    out = copy.deepcopy(results)
    *way, last = path
    inner = out
    for key in way:
        inner = inner[key]
    inner[last] = {"value": value, "se": 0.001, "n": 12}
    return out


@pytest.mark.parametrize(
    ("path", "value", "before", "after"),
    [
        (("numbers", "largest deviation / chord"), 0.3, "nearly straight", "clearly bent"),
        (("numbers", "largest deviation / chord"), 0.05, "nearly straight", "slightly bent"),
        (("numbers", "states near the end from sigma"), 60.0, "before states do", "no earlier than states, from 60"),
        (("shape", "curved to sigma"), 0.0, "then run straight again to", "no last straight stage is seen"),
        (("shape", "curved from sigma"), 80.0, "They run straight, and bend", "They bend from the start"),
        (("likelihood", "met"), 0.5, "d1 <= d2, ", "d1 <= d2, holds at 50.00 ± 0.10 %"),
        (("likelihood", "state"), 0.25, "Likelihood rises at", "rises at 25.00 ± 0.10 % of the steps to the next"),
        (("regularity", "nulls", "smooth", "procrustes"), 0.01, "Shapes are", "less than random smooth"),
        (("regularity", "nulls", "forward", "torsion"), 9.0, "Their", "Their torsion is more alike than noise paths"),
    ],
)  # fmt: skip
def test_words_change_with_the_figures(found, path, value, before, after):
    told = "\n".join(sentences(found["grid"]))
    assert before in told
    assert after not in told
    assert after in "\n".join(sentences(changed(found["grid"], *path, value=value)))


def test_chance_is_beaten_by_more_than_two_errors(found):
    """Shapes of one law in many dimensions are one shape; equal figures are no more alike than chance."""
    grid = found["grid"]
    own = {"value": grid["regularity"]["procrustes"][0][0], "se": 0.0, "n": 12}
    for null in ("smooth", "forward"):
        grid = changed(grid, "regularity", "nulls", null, "procrustes", value=own["value"])
    assert "Shapes are no more alike than by chance" in "\n".join(sentences(grid))
    told = line(found["three"], "^Shapes are")
    inner = found["three"]["regularity"]["procrustes"][0][0]
    assert (inner < found["three"]["regularity"]["nulls"]["smooth"]["procrustes"]["value"]) == (
        "more alike than random smooth curves" in told
    )
    assert "mixture:ring8" in line(found["grid"], "ring8")


def test_classes_are_counted(tmp_path):
    own = results(tmp_path / "run", "data:digits8,count=90", steps=8, count=30, drawn=30, label="each")
    told = line(own, "groups")
    alike = sum(
        own["regularity"]["procrustes"][c][c] + 2 * own["regularity"]["se"]["procrustes"][c][c]
        < min(null["procrustes"]["value"] for null in own["regularity"]["nulls"].values())
        for c in range(10)
    )
    assert int(re.search(r"in (\d+) of 10 groups", told)[1]) <= alike
    assert not any(each.startswith("Shapes are") for each in sentences(own))


def test_few_levels_and_few_curves_tell_nothing(tmp_path):
    """A curvature from half of a run has no place in it, and one pair of curves no error."""
    few = results(tmp_path / "few", "mixture:grid2", steps=12, count=2, drawn=2)
    assert math.isnan(Estimate(**few["regularity"]["nulls"]["smooth"]["procrustes"]).se or math.nan)
    told = "\n".join(sentences(few))
    assert "with 12 levels, each curvature is fitted to 11 of them" in told
    assert "bend from" not in told
    assert "Shapes are not compared with chance" in told
    assert "more alike" not in told
    assert "less alike" not in told


def test_the_undecided_stage_has_a_last_level(found):
    """The level told is one at which the posterior is still open: more than 5 % of log N is left there."""
    grid = found["grid"]
    assert "; its last level is " in line(grid, "By the posterior")
    last, sigmas = grid["numbers"]["stage.entropy.last"]["value"], grid["sigmas"]
    assert min(sigma for sigma in sigmas if sigma > 0) <= last <= grid["numbers"]["stage.entropy.first"]["value"]


def test_of_classes_those_count_that_are_nearer_than_both_kinds_of_chance_by_two_errors(found):
    """Chance is 0.3 and 0.5, each ± 0.01: below 0.3 by far are three; one class has no pair."""
    own = copy.deepcopy(found["grid"])
    own["groups"] = [f"class {c}" for c in range(10)]
    values = [0.2, 0.25, 0.1, 0.28, 0.29, 0.3, 0.4, 0.45, 0.6, None]
    table = [[value if i == j else 0.7 for j in range(10)] for i, value in enumerate(values)]
    errors = [[None if value is None else 0.01] * 10 for value in values]
    own["regularity"] |= {"names": own["groups"], "procrustes": table}
    own["regularity"]["se"]["procrustes"] = errors
    for null, value in (("smooth", 0.3), ("forward", 0.5)):
        own["regularity"]["nulls"][null]["procrustes"] = {"value": value, "se": 0.01, "n": 12}
    assert line(own, "groups").endswith(" in 3 of 9 groups.")


def test_no_number_is_lost_and_none_reads_as_nothing(found):
    for run in found.values():
        shown = tables(run)
        text = "\n".join(cell for each in shown for row in each.rows for cell in row)
        assert not re.search(r"\b0\.0+ ± 0\.0+\b", text)
        names = {row[0] for each in shown for row in each.rows}
        by_dimension = re.compile(r"(z )?explained by \d|mean error in \d-D|direct, top \d")
        for name in run["numbers"] | run["shape"]:
            assert name in names or by_dimension.fullmatch(name), name
    (flat,) = [each for each in tables(found["three"]) if each.name == "dimensions"]
    assert len(flat.rows) == 3  # nothing is left in more
    assert flat.rows[1][1] == Estimate(*found["three"]["numbers"]["explained by 1"].values()).rounded()


@given(
    st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-6),
    st.floats(1e-7, 1e4),
)
def test_figures_have_as_many_digits_as_their_errors_bear(value, se):
    told = Estimate(value, se, 9).rounded()
    if se <= 1e-6 * abs(value):
        assert float(told) == pytest.approx(value, rel=1e-5)
        return
    match = re.fullmatch(r"\(?(-?[\d.]+) ± ([\d.]+)(?:\)e(-?\d+))?", told)
    assert match is not None, told
    scale = 10.0 ** int(match[3] or 0)
    number, error = float(match[1]) * scale, float(match[2]) * scale
    assert error == pytest.approx(se, rel=0.2)
    assert abs(number - value) <= 0.51 * se
    digits = match[2].replace(".", "").strip("0")
    assert 1 <= len(digits) <= 2
    assert number == 0 or math.copysign(1, number) == math.copysign(1, value)


def test_the_command_says_it_in_words(tmp_path):
    words = ("geometry", "mixture:ring8", "--steps", 8, "--count", 4, "--out", tmp_path / "run")
    result = fanal(*words)
    assert result.exit_code == 0, result.output
    told = sentences(record(tmp_path / "run")["results"])
    assert result.output.splitlines()[: len(told)] == told
    assert result.output.count("standard error") == 1
    assert "by chance: random smooth curves" in result.output
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert all(each in page for each in (*told, "steps nearer to the end"))
