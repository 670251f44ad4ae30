"""The page of `fanal geometry`: every number is told, every figure and every table says how to read it."""

from __future__ import annotations

import math
import re

import pytest

from fanal.geometry.command import GeometryConfig
from fanal.geometry.command import geometry as measure
from fanal.metrics import Estimate
from fanal.report.geometry import geometry_page
from fanal.report.geometry.likeness import KEYS, compared
from fanal.report.geometry.run import LABELS, GeometryRun
from toys import fanal, record


def tables_of(folder):
    return {table.name: table for table in geometry_page(folder, record(folder)).tables}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A run with all that can be measured: the data beside it, from encoded images."""
    place = tmp_path_factory.mktemp("everything")
    words = ("encode", "gaussian:digits8", "--data", "digits8", "--count", 70, "--steps", 4, "--out", place / "codes")
    assert fanal(*words).exit_code == 0
    config = GeometryConfig("gaussian:digits8", steps=8, count=70, drawn=3, data="digits8", points=80,
                            noise=str(place / "codes" / "noise.safetensors"))  # fmt: skip
    return measure(config, place / "run")


def test_the_page_tells_every_number_and_asks_for_none_that_is_not_measured(everything, monkeypatch):
    asked, own = set(), GeometryRun.table

    def asking(run, name, numbers, *more, **settings):
        asked.update(numbers)
        return own(run, name, numbers, *more, **settings)

    monkeypatch.setattr(GeometryRun, "table", asking)
    tables = tables_of(everything)
    results = record(everything)["results"]
    measured = set(results["numbers"] | results["shape"])
    assert asked <= measured
    by_dimension = {
        name for name in measured if re.fullmatch(r"explained by \d|mean error in \d-D|direct, top \d", name)
    }
    told = {LABELS.get(name, name) for name in measured - by_dimension}
    assert {row[0] for table in tables.values() for row in table.rows} >= told
    assert len(tables["dimensions"].rows) == 1 + sum(name.startswith("explained by") for name in measured)
    assert [cell.count("±") for cell in tables["pca-ratios"].rows[0][1:]] == [1, 1, 1]


def test_every_figure_and_every_table_says_how_to_read_it(everything, tmp_path):
    plane = measure(GeometryConfig("mixture:ring8", "heun", steps=6, count=3, drawn=2), tmp_path / "plane")
    for folder in (everything, plane):
        page = geometry_page(folder, record(folder))
        assert [each.name for each in (*page.figures, *page.tables) if not each.caption] == []


def test_a_plane_shows_no_rounding(tmp_path):
    """In two dimensions one component explains all, nothing is left in two, and the second component is 0."""
    plane = measure(GeometryConfig("mixture:grid2", steps=8, count=4, drawn=4), tmp_path / "plane")
    page = geometry_page(plane, record(plane))
    figures = {figure.name: figure for figure in page.figures}
    left, right = figures["reconstruction"].drawings
    assert [list(line.x) for line in (*left.lines, *right.lines)] == [[1], [1]]
    assert right.lines[0].y == [100]
    curves = figures["boomerang"].drawings[0].curves
    assert {point[2] for curve in curves for point in curve} == {0}
    assert any(point[1] for curve in curves for point in curve)
    assert len(next(table for table in page.tables if table.name == "dimensions").rows) == 2


def test_tables_by_level_are_the_bands(everything):
    tables = tables_of(everything)
    results = record(everything)["results"]
    bands, head = results["bands"], ["magnitude", "forward magnitude", "denoised magnitude", "slope", "exact slope"]
    rows = tables["sizes"].rows
    assert [float(row[0]) for row in rows] == pytest.approx(results["sigmas"][:-1], rel=1e-3)
    for i, row in enumerate(rows):
        for name, text in zip(head, row[1:], strict=True):
            told = Estimate(bands[name]["mean"][i], bands[name]["se"][i], 0)
            assert text == told.rounded(), name
    name = "direct, top 2"
    spread = results["numbers"][name]["se"] * math.sqrt(results["numbers"][name]["n"])
    value = results["numbers"][name]["value"]
    assert tables["pca-ratios"].rows[0][2] == f"{100 * value:.6f} ± {100 * spread:.6f} %"


def test_the_pendulum_is_drawn_beside_the_noise_level(everything):
    """It is the speed times sigma √d, so that its contraction is the ratio of successive speeds."""
    (figure,) = [each for each in geometry_page(everything, record(everything)).figures if each.name == "pendulum"]
    way, contraction = figure.drawings
    results = record(everything)["results"]
    bands, sigmas = results["bands"], results["sigmas"]
    assert list(way.lines[0].y) == pytest.approx(bands["pendulum"]["mean"], rel=1e-5)
    assert list(way.lines[1].y) == pytest.approx([8 * sigma for sigma in sigmas[:-1]], rel=1e-5)
    speed = bands["slope"]["mean"]
    want = [after / before for before, after in zip(speed[:-1], speed[1:], strict=True)]
    assert list(contraction.lines[0].y) == pytest.approx(want, rel=1e-4)
    assert list(contraction.lines[0].x) == pytest.approx(sigmas[: len(want)], rel=1e-5)


def test_pairs_that_a_table_leaves_out_are_counted():
    """Of 30 groups, 465 pairs: 24 in the terminal, 210 on a page, and how many more there are."""
    size = 30
    found = {"names": [f"group {i}" for i in range(size)], "se": {}, "nulls": {}}
    found |= {key: [[abs(i - j) / size for j in range(size)] for i in range(size)] for key in KEYS}
    for most in (24, 210, 465):
        rows = compared(found, most)
        assert len(rows) == most + (most < 465)
        assert rows[0][0] == "within group 0"
        assert (rows[-1][0] == f"{465 - most} more pairs, in run.json") == (most < 465)
    assert compared(found)[-1][0].startswith("441 more")
