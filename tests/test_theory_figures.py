"""The figures of the theory: they show what checks compared, each statement links to one, and files fit a page."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fanal.errors import FanalError
from fanal.particles import theory as samplers
from fanal.pde import theory as densities
from fanal.pde.theory import forward
from fanal.pde.theory.panels import Curve, Panel, decay, sides
from fanal.report.sheets import LIMIT, Row, row, sheet, write_sheet

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = {"theory.md": densities.SHEETS, "theory-samplers.md": samplers.SHEETS}
LINE = np.array([1.0, 2.0, 3.0])


def drawn(axes):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


def test_a_figure_shows_the_numbers_of_its_check(tmp_path):
    found = forward.transition()
    canvas = sheet([row("transition", found)])
    (part,) = canvas.subfigs
    assert f"{found.error:.2g}, allowed {found.tolerance:.2g}; holds" in part.get_suptitle()
    for axes, panel in zip(part.axes, found.panels, strict=True):
        assert drawn(axes) == [(list(curve.x), list(curve.y)) for curve in panel.curves]
    off = found.panels[1].curves[1]
    width = off.x[1] - off.x[0]
    assert np.abs(off.y).sum() * width / 2 == pytest.approx(found.error)


def test_a_sheet_is_a_small_opaque_picture(tmp_path):
    panel = Panel(
        "plane $",
        "x",
        "y",
        [Curve("a", LINE, LINE, "points", spread=LINE / 10), Curve("b", LINE, 2 * LINE, "dashed", -1)],
        levels={"two": 2.0},
        square=True,
        falling=True,
        image=(np.arange(4.0), np.arange(5.0), np.ones((4, 3))),
    )
    write_sheet([Row("heading", "note", [panel]), Row("other", "", [panel, panel])], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width == 924
        assert "transparency" not in image.info
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert (tmp_path / "sheet.png").stat().st_size < LIMIT


def test_decay_shows_slope_and_exponents():
    x = np.array([1.0, 2.0, 4.0])
    sizes, powers = decay(x, {"a": 5 * x**-2}, {"a": -2.0}, "x", "size", power=True)
    assert sizes.log == "xy"
    assert sizes.curves[0].y == pytest.approx(sizes.curves[1].y)
    assert powers.curves[0].y == pytest.approx([-2, -2])
    rates = decay(x, {"a": np.exp(-3 * x)}, {"a": 3.0}, "x", "size")[1]
    assert rates.curves[0].y == pytest.approx([3, 3])
    assert rates.levels == {"theory: 3": 3.0}


def test_sides_of_an_identity_keep_a_difference_of_zero_on_the_page():
    both, off = sides(np.array([1.0, 2.0]), np.array([1.0, 2.0 + 1e-10]), 1e-12)
    assert list(both.curves[1].y) == [1.0, 2.0]
    assert off.curves[0].y == pytest.approx([1e-18, 5e-11], rel=1e-3)


def test_what_tells_is_finite_and_not_constant():
    assert Curve("", LINE, LINE).tells
    assert not Curve("", LINE, np.ones(3)).tells
    assert not Curve("", LINE, np.array([np.nan, 1.0, np.inf])).tells
    with pytest.raises(FanalError, match="look of a curve"):
        Curve("", LINE, LINE, "wavy")


@pytest.mark.parametrize("page", PAGES)
def test_every_statement_links_to_its_figure(page):
    """Each row of the statement table names a sheet, the sheet is on the page, and below the heading that is linked."""
    text, sheets = (DOCS / page).read_text(encoding="utf-8"), PAGES[page]
    table = text[text.index("| [PDE] | statement |") :].split("\n\n")[0].splitlines()[2:]
    figures = [re.search(r"\| \[(\w+)\]\(#([\w-]+)\) \|$", line) for line in table]
    assert all(figures), [line for line, found in zip(table, figures, strict=True) if not found]
    names = [found[1] for found in figures if found]
    assert {name: names.count(name) for name in sheets} == {name: len(own) for name, own in sheets.items()}
    parts = re.split(r"^#+ (.*)\n", text, flags=re.MULTILINE)
    below = {
        re.sub(r"[^\w-]", "", head.lower().replace(" ", "-")): body
        for head, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    for found in figures:
        assert found is not None
        assert f"images/theory-{found[1]}.png" in below[found[2]]
        assert (DOCS / "images" / f"theory-{found[1]}.png").is_file()


def test_all_figures_of_the_theory_are_light_enough_for_their_pages():
    named = {
        name for page in PAGES for name in re.findall(r"images/(theory-[\w-]+\.png)", (DOCS / page).read_text("utf-8"))
    }
    files = [DOCS / "images" / name for name in named]
    assert {path.name for path in (DOCS / "images").glob("theory-*.png")} == named
    assert max(path.stat().st_size for path in files) <= LIMIT
    assert sum(path.stat().st_size for path in files) <= 2 * 1024**2
