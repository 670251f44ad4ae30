"""Figures: a page and a paper show the same numbers, and files are what they should be."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fanal.errors import FanalError
from fanal.report import figures, paper
from fanal.report.plots import Bars, Figure, Film, Heat, Line, Mark, Panel, Picture, Sheet, Space, colored, histogram
from fanal.report.study import Table

GENERATOR = torch.Generator().manual_seed(0)
X = [80.0, 10.0, 1.0, 0.1]
BANDED = Panel(
    "sigma",
    "distance $",
    [
        Line("a $x$", X, [4.0, 3.0, 2.0, 1.0], [0.5, 0.4, 5.0, 0.2]),
        Line("b", X, [1.0, 2.0, 3.0, 4.0], color="#d1495b", dashed=True),
    ],
    [Mark(10.0, "here"), Mark(2.0, "level", level=True)],
    log_x=True,
    log_y=True,
    falling=True,
)
POINTS = Panel("steps", "error", [Line("", [1, 2, 4], [3.0, 2.0, 1.0], [0.1, 0.2, 0.3], points=True)], from_zero=True)


def film(k=2, n=5, high=4, wide=6, channels=3):
    images = [torch.randint(0, 256, (k, n, high, wide, channels), generator=GENERATOR, dtype=torch.uint8) for _ in "ab"]
    return Film({"states": images[0], "predictions": images[1]}, [f"sigma {i}" for i in range(n)])


def axes_of(*drawings):
    return paper.canvas(Figure("name", "", drawings)).axes


def test_page_and_paper_draw_the_same_curves():
    page, (axes,) = figures._panel(BANDED), axes_of(BANDED)
    curves = [trace for trace in page.data if trace.mode == "lines" and trace.fill is None]
    lines = [line for line in axes.lines if len(line.get_xdata()) == len(X)]
    assert len(curves) == len(lines) == 2
    for trace, line, told in zip(curves, lines, BANDED.lines, strict=True):
        assert list(trace.x) == list(line.get_xdata()) == list(told.x)
        assert list(trace.y) == list(line.get_ydata()) == list(told.y)
        assert trace.line.color == line.get_color()
        assert (trace.line.dash == "dash") == (line.get_linestyle() == "--") == told.dashed
    assert (page.layout.xaxis.type, page.layout.yaxis.type) == (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert page.layout.xaxis.autorange == "reversed"
    assert axes.get_xlim()[0] > axes.get_xlim()[1]
    (band,) = [trace for trace in page.data if trace.fill == "toself"]
    assert list(band.y) == [4.5, 3.4, 7.0, 1.2, 0.8, pytest.approx(0.02), 2.6, 3.5]  # what is below 0 stays on the axis
    (area,) = axes.collections
    drawn = {(round(x, 9), round(y, 9)) for x, y in area.get_paths()[0].vertices.tolist()}
    assert {(round(x, 9), round(y, 9)) for x, y in zip(band.x, band.y, strict=True)} <= drawn


def test_a_mark_is_where_it_is_said_to_be_on_a_logarithmic_axis():
    page = figures._panel(BANDED)
    upright, level = page.layout.shapes
    assert (upright.x0, upright.x1, level.y0, level.y1) == (10.0, 10.0, 2.0, 2.0)
    words = {note.text: note for note in page.layout.annotations}
    assert words["here"].x == 1.0  # words are placed by the logarithm
    assert words["level"].y == pytest.approx(math.log10(2))


@pytest.mark.parametrize(
    ("values", "labels", "apart"),
    [
        ([0.3, 2.4], [0.5, 1, 2], None),  # less than a decade
        ([0.015, 0.06], [0.02, 0.05], None),
        ([3.1, 3.4], None, None),  # so short that the plotting library chooses
        ([0.5, 20.0], None, 1),
        ([0.3, 0.3], None, 1),
        ([1e-12, 1e4], None, 2),
    ],
)
def test_a_logarithmic_axis_has_labels_however_short_it_is(values, labels, apart):
    page = figures._panel(Panel("sigma", "distance", [Line("", values, values)], log_x=True, log_y=True))
    for axis in (page.layout.xaxis, page.layout.yaxis):
        assert axis.dtick == apart
        assert (axis.tickvals if labels is None else list(axis.tickvals)) == (labels and pytest.approx(labels))


def test_few_points_are_ticks_and_carry_error_bars():
    page, (axes,) = figures._panel(POINTS), axes_of(POINTS)
    assert list(page.layout.xaxis.tickvals) == list(axes.get_xticks()) == [1, 2, 4]
    assert list(page.data[0].error_y.array) == [0.1, 0.2, 0.3]
    (bars,) = axes.containers
    ends = bars.lines[2][0].get_segments()
    assert [[round(float(v), 9) for v in end[:, 1]] for end in ends] == [[2.9, 3.1], [1.8, 2.2], [0.7, 1.3]]
    assert axes.get_ylim()[0] == 0
    assert page.layout.yaxis.rangemode == "tozero"


def test_a_histogram_counts_every_finite_value_once():
    values = torch.randn(1000, generator=GENERATOR).tolist()
    bars = histogram("x", {"all": [*values, math.nan], "few": [0.0, 0.1]}, bins=20, share=False)
    heights, edges = np.histogram(values, 20)
    assert bars.groups["all"] == heights.tolist()
    assert np.allclose(bars.edges, edges)
    share = histogram("x", {"all": values})
    assert sum(share.groups["all"]) == pytest.approx(100)
    page, (axes,) = figures._bars(bars), axes_of(bars)
    for trace, patch, name in zip(page.data, axes.patches, bars.groups, strict=True):
        assert list(trace.y) == list(patch.get_data().values) == bars.groups[name]
    assert histogram("x", {"none": [], "one": [2.0]}).groups["none"] == [0.0] * 50
    assert sum(histogram("x", {"one": [2.0]}).groups["one"]) == 100


def test_space_and_heat_are_the_same_on_both():
    space = Space(("a", "b", "c"), torch.randn(3, 7, 3, generator=GENERATOR).tolist())
    page, (axes,) = figures._space(space), axes_of(space)
    for trace, line, points in zip(page.data, axes.lines, space.curves, strict=True):
        assert torch.equal(torch.tensor([trace.x, trace.y, trace.z]).T, torch.tensor(points))
        assert np.allclose(np.stack(line.get_data_3d(), 1), points)
    named = Heat("", "", ["p", "q $"], ["p", "q $"], [[0.25, None], [1.5, 3.0]], "far", written=True)
    page, (axes, bar) = figures._heat(named), axes_of(named)
    assert [list(row) for row in page.data[0].z] == [[0.25, None], [1.5, 3.0]]
    assert np.allclose(np.ma.filled(axes.images[0].get_array(), -1), [[0.25, -1], [1.5, 3.0]])
    assert sorted(text.get_text() for text in axes.texts) == ["0.25", "1.5", "3"]
    assert bar.get_ylabel() == "far"
    placed = Heat("sigma", "k", [10.0, 1.0, 0.1], [1.0, 2.0], [[1, 2, 3], [4, 5, 6]], "log", falling=True)
    page, (axes, _) = figures._heat(placed), axes_of(placed)
    assert np.allclose(axes.collections[0].get_array().reshape(2, 3), page.data[0].z)
    assert axes.get_xscale() == page.layout.xaxis.type == "log"
    assert axes.get_xlim()[0] > axes.get_xlim()[1]


def decoded(uri):
    import base64
    import io

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_a_sheet_holds_every_picture_in_its_place():
    images = film().layers["states"]
    k, n, high, wide = images.shape[:4]
    pixels = decoded(figures._packed(images))
    for i in range(k):
        for j in range(n):
            part = pixels[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            assert np.array_equal(part, images[i, j].numpy())
    gray = images[..., :1]
    assert np.array_equal(decoded(figures._packed(gray))[:high, :wide, 2], gray[0, 0, :, :, 0].numpy())
    large = torch.zeros(6, 24, 128, 96, 3, dtype=torch.uint8)
    high, wide, _ = decoded(figures._packed(large)).shape  # large pictures are made smaller
    assert (high % 6, wide % 24) == (0, 0)
    assert (high / 6) / (wide / 24) == pytest.approx(128 / 96, rel=0.03)
    assert high * wide <= 1.05 * figures._MOST_PIXELS


def test_a_film_on_paper_shows_its_first_runs_from_start_to_end():
    told = film(k=9, n=31)
    sheet = paper._laid(told)
    assert sheet.images.shape[:2] == (12, 10)
    assert (sheet.columns[0], sheet.columns[-1]) == ("sigma 0", "sigma 30")
    assert sheet.rows == ["states", "predictions"] * 6
    for i in range(12):
        layer = told.layers[sheet.rows[i]][i // 2]
        assert torch.equal(sheet.images[i, 0], layer[0])
        assert torch.equal(sheet.images[i, -1], layer[-1])


def test_colors_go_by_name_and_the_legend_names_each_once():
    lines = [Line("a", [], []), Line("a", [], []), Line("", [], []), Line("b", [], [], color="#123456")]
    assert [first for *_, first in colored(lines)] == [True, False, False, True]
    assert [color for _, color, _ in colored(lines)][3] == "#123456"
    assert len({color for _, color, _ in colored(lines)}) == 4


EVERY = [
    BANDED,
    POINTS,
    histogram("x", {"a": [1.0, 2.0], "b": [1.5]}),
    Space(("a", "b", "c"), [[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]]),
    Heat("", "", ["p"], ["p"], [[1.0]], "far", written=True),
    film(),
    Sheet(film().layers["states"], ["one", "two"], [str(i) for i in range(5)]),
]


def test_files_are_whole_and_the_same_each_time(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "picture.png")
    drawings = [*EVERY, Picture(tmp_path / "picture.png", "red")]
    told = [Figure(f"figure-{i}", f"caption {i}", [drawing]) for i, drawing in enumerate(drawings)]
    told.append(Figure("both", "side by side", [BANDED, POINTS]))
    table = Table("numbers", ["what & why", "Top-1"], [["a_b", "99.9 ± 0.1 %"], ["‖x‖/√d", "–"]], "shares")
    files = paper.write_all(tmp_path / "out", told, [table], ("png",))
    assert len(files) == len(told) + 1
    files += paper.write_all(tmp_path / "out", told[-2:], [table], ("pdf", "svg"))
    first = {file.name: file.read_bytes() for file in files}
    for file in files:
        if file.suffix == ".png":
            with Image.open(file) as image:
                assert min(image.size) > 100
                assert len(image.convert("RGB").getcolors(1 << 24) or []) > 1
    assert all(content.startswith(b"%PDF") for name, content in first.items() if name.endswith(".pdf"))
    tex = (tmp_path / "out" / "numbers.tex").read_text(encoding="utf-8").splitlines()
    assert tex[0] == r"\begin{tabular}{lr}"
    assert tex[1] == r"what \& why & Top-1 \\"
    assert tex[3:5] == [r"a\_b & 99.9 $\pm$ 0.1 \% \\", r"$\|$x$\|$/$\surd$d & -- \\"]
    paper.write_all(tmp_path / "again", told[-2:], [table], paper.FORMATS)
    again = {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()}
    assert again.keys() - first.keys() == {"captions.txt"}
    assert {name: first[name] for name in again if name in first} == {
        name: again[name] for name in again if name in first
    }
    words = (tmp_path / "again" / "captions.txt").read_text(encoding="utf-8")
    assert "both: side by side\n" in words
    assert "numbers: shares\n" in words


def test_letters_tell_the_parts_of_a_figure():
    assert [axes.get_title(loc="left") for axes in axes_of(BANDED, POINTS)] == ["(a)", "(b)"]
    assert [axes.get_title(loc="left") for axes in axes_of(POINTS)] == [""]


def test_formats_are_read_or_refused(monkeypatch):
    assert paper.formats_of("PDF, png,pdf") == ("pdf", "png")
    assert paper.formats_of(None) == ()
    for wrong in ("gif", "", "pdf,"):
        with pytest.raises(FanalError, match="pdf, png, svg"):
            paper.formats_of(wrong)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FanalError, match=r"fanal\[figures\]"):
        paper.formats_of("pdf")


def test_a_name_is_no_code_and_no_formula():
    evil = "</script><script>alert(1)</script>"
    panel = Panel(evil, evil, [Line(evil, [1.0], [1.0])])
    drawn = figures.markup(Figure("name", evil, [panel, Film({evil: film().layers["states"]}, [evil] * 5)]))
    assert "<script>alert" not in drawn
    (axes,) = axes_of(panel, Bars("$x", "y_^$", [0, 1], {"$": [1.0]}))[:1]
    axes.figure.savefig("/dev/null", format="png")
