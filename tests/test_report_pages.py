"""Pages of every kind of run: what they say, and what a browser shows of them, in light, in dark and on a phone."""

from __future__ import annotations

import io
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fanal.encoding import EncodeConfig, encode_run
from fanal.errors import FanalError
from fanal.files import read_json, read_tensors, write_json, write_tensors
from fanal.geometry.command import GeometryConfig
from fanal.geometry.command import geometry as measure
from fanal.memorization.command import AuditConfig, audit
from fanal.report import write_figures, write_report
from fanal.report.audit import audit_page
from fanal.report.geometry import geometry_page
from fanal.report.plots import Film
from fanal.report.study import SOURCES
from fanal.summary import estimated
from toys import fanal, record, refused

LIMIT = 8e6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def runs(place):
    """A run of every kind that is not a sampling run, all of them small."""
    digits = {"steps": 16, "count": 12, "drawn": 6}
    shape = GeometryConfig("gaussian:digits8", data="digits8", points=90, against=("mixture:digits8",), **digits)
    codes = {"count": 4, "steps": (4, 8), "other": ("mixture:digits8",), "also": ("euler",)}
    points = GeometryConfig("mixture:grid2", steps=12, count=5, drawn=3)
    return {
        "digits": measure(shape, place / "digits"),
        "points": measure(points, place / "points"),
        "audit": audit(AuditConfig("gaussian:digits8", "digits8", steps=4, count=12, traced=6), place / "audit"),
        "encode": encode_run(EncodeConfig("gaussian:digits8", "digits8", **codes), place / "encode"),
    }


def page_of(folder):
    return geometry_page(folder, read_json(folder / "run.json"))


def drawing(folder, name, place=0):
    (found,) = [figure for figure in page_of(folder).figures if figure.name == name]
    return found.drawings[place]


def text_of(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    return re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", page, flags=re.S)


def test_a_geometry_page_has_every_figure_that_its_run_has_data_for(runs):
    always = {"deviation", "reconstruction", "boomerang", "bending", "turning", "pendulum", "magnitude", "slope"}
    always |= {"predictions", "z-space", "weights", "forward-paths", "spectra", "reconstruction-steps", "rebuilt"}
    digits = always | {"strips", "score", "diagnosis", "neighbors", "entropy", "coefficients", "likelihood"}
    digits |= {"residual", "residual-spectrum", "regularity"}
    assert {figure.name for figure in page_of(runs["digits"]).figures} == digits
    assert {figure.name for figure in page_of(runs["points"]).figures} == always
    for folder in runs.values():
        page = (folder / "report.html").read_text(encoding="utf-8") if folder.name != "encode" else ""
        assert len(page) < LIMIT
    captions = {figure.name: figure.caption for figure in page_of(runs["digits"]).figures}
    for name, number in (("deviation", "3"), ("boomerang", "5"), ("bending", "6"), ("entropy", "9"), ("slope", "12")):
        assert re.search(rf"\[REG\] fig\. {number}\b", captions[name]), name
    assert re.search(r"\[REG\] fig\.\s+15", captions["residual"])


def test_curves_are_the_runs_bands(runs):
    bands = record(runs["digits"])["results"]["bands"]
    flat = drawing(runs["digits"], "deviation")
    for line, name in zip(flat.lines, ("deviation", "distance"), strict=True):
        assert np.allclose(line.y, bands[name]["mean"], rtol=1e-5)
        assert np.allclose(line.spread, bands[name]["std"], rtol=1e-5)
    assert list(flat.lines[0].x) == pytest.approx(record(runs["digits"])["results"]["sigmas"], rel=1e-5)
    steep = drawing(runs["digits"], "deviation", 1)
    assert steep.log_y
    assert min(value for line in steep.lines for value in line.y) > 0  # both ends are 0 but for rounding
    score, four = (drawing(runs["digits"], "score", k) for k in (0, 1))
    assert np.allclose(score.lines[1].y, bands["score deviation on exact path"]["mean"], rtol=1e-5)
    assert len(four.lines) == 4


def test_the_residual_of_a_gaussian_is_its_deviation(place):
    folder = measure(GeometryConfig("gaussian:digits8", steps=60, count=64, drawn=2), place / "gaussian")
    deviation, whole, across = drawing(folder, "residual").lines
    # 64 starts: the mean square has a relative standard error of a few percent, Euler's own error is below one.
    for i in range(1, 40):
        measured = math.hypot(deviation.y[i], deviation.spread[i])
        assert measured == pytest.approx(across.y[i], rel=0.08)
        assert across.y[i] < whole.y[i]


def test_the_rate_of_entropy_adds_up_to_what_it_lost(runs):
    entropy, rate = (drawing(runs["digits"], "entropy", k).lines[0] for k in (0, 1))
    lost = np.trapezoid(rate.y, np.log(rate.x))
    assert lost == pytest.approx(entropy.y[-1] - entropy.y[0], rel=0.05)


def test_shares_add_up_to_all_of_a_sample(runs):
    (table,) = [table for table in page_of(runs["digits"]).tables if table.name == "weights-sum"]
    assert sum(float(row[1]) for row in table.rows) == pytest.approx(1, abs=1e-5)
    assert drawing(runs["digits"], "weights").lines[1].y[-1] == pytest.approx(1, abs=1e-4)


def test_what_the_last_state_is_made_of_is_told_from_its_shares(runs):
    """By [REG] eq. 17: the last prediction has `1 − sigma_N/sigma_{N−1}`, all earlier ones the rest but the start's."""
    found = record(runs["digits"])["results"]
    sigmas = [sigma for sigma in found["sigmas"] if sigma > 0]
    last, start = 1 - sigmas[-1] / sigmas[-2], sigmas[-1] / sigmas[0]
    assert (
        f"at sigma {sigmas[-1]:.4g}, has {100 * last:.3g} % from the last prediction, made at sigma {sigmas[-2]:.4g}, "
        f"and {100 * (1 - last - start):.3g} % from all earlier ones."
    ) in text_of(runs["digits"])


def test_weights_of_single_points_are_drawn_as_they_are_down_to_1e_10(runs):
    told, _ = read_tensors(runs["digits"] / "geometry.safetensors")
    weights = told["point_weights"].double()
    lines = drawing(runs["digits"], "coefficients").lines
    assert len(lines) == weights.shape[0] * weights.shape[2]
    for k, line in enumerate(lines):
        own = weights[k // weights.shape[2], :, k % weights.shape[2]]
        assert np.allclose(line.y, np.log10(own.numpy() + 1e-10), atol=1e-5)
    assert min(min(line.y) for line in lines) < -9  # some weigh nothing at all, and a floor higher up would hide 1e-6


def test_torsion_is_drawn_where_a_curve_bends(runs):
    told, _ = read_tensors(runs["digits"] / "geometry.safetensors")
    curvature, torsion = (drawing(runs["digits"], "bending", k).lines for k in (0, 1))
    for bend, twist in zip(curvature, torsion, strict=True):
        straight = np.asarray(bend.y) <= 0.02 * max(bend.y)
        assert np.array_equal(np.isnan(twist.y), straight)
    assert np.allclose(curvature[0].y, told["curvature"][0, : len(curvature[0].y)], rtol=1e-4)


def test_flagged_levels_are_marked_and_told(place, runs):
    folder = shutil.copytree(runs["digits"], place / "flagged")
    told = read_json(folder / "run.json")
    told["results"]["flagged"] = [{"sigma": 3.25, "deviation": 0.5, "usual": 0.1, "z": 9.0}]
    write_json(folder / "run.json", told)
    (mark,) = drawing(folder, "score").marks
    assert (mark.at, mark.text) == (3.25, "5×")
    write_report(folder)
    assert "1 level whose score deviation stands out" in text_of(folder)
    assert "stands out" not in text_of(runs["digits"]).replace("no level stands out", "")


def test_strips_are_those_that_were_kept(runs):
    tensors, _ = read_tensors(runs["digits"] / "geometry.safetensors")
    film = drawing(runs["digits"], "strips")
    assert isinstance(film, Film)
    assert torch.equal(film.layers["states"], tensors["strip_x"])
    assert torch.equal(film.layers["predictions"], tensors["strip"])
    assert film.labels[0] == "sigma 80"
    sheet = drawing(runs["digits"], "neighbors")
    assert sheet.rows[:3] == ["end 1", "exact end 1", "end 2"]
    assert torch.equal(sheet.images[2, 0], tensors["strip"][1, -1])
    assert torch.equal(sheet.images[3, 1:], tensors["neighbors"][1, 1])


def long(folder, place, side, steps=1000):
    """The same run as if it had many steps, many drawn curves and colored pictures that do not pack."""
    target = shutil.copytree(folder, place / f"long-{side}")
    told, (tensors, _) = read_json(target / "run.json"), read_tensors(target / "geometry.safetensors")
    results, before = told["results"], len(told["results"]["sigmas"])

    def stretched(values):
        count = steps + 1 - (before - len(values))
        return np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(values)), values).tolist()

    results["bands"] = {
        name: {part: stretched(values) for part, values in band.items()} for name, band in results["bands"].items()
    }
    results["sigmas"] = [*np.geomspace(80, 0.002, steps).tolist(), 0.0]
    shares = {"prediction": [1 / steps] * (steps - 1), "between": [False] * (steps - 1)}
    results["weights"] |= {"sigmas": results["sigmas"][:-2], **shares}
    results["likelihood"] |= {k: [0.5] * steps for k in results["likelihood"] if k.endswith("steps")}
    noise = torch.Generator().manual_seed(0)
    for name in ("aligned", "forward", "curvature", "torsion"):
        tensors[name] = torch.randn(30, steps + 1, *tensors[name].shape[2:], generator=noise)
    tensors["point_weights"] = torch.rand(6, steps, 5, generator=noise)
    for name in [name for name in tensors if name.startswith("strip") and name != "strip_sigmas"]:
        tensors[name] = torch.randint(0, 256, (6, 24, side, side, 3), generator=noise, dtype=torch.uint8)
    tensors["strip_sigmas"] = torch.linspace(80, 0, 24)
    tensors["neighbors"] = torch.randint(0, 256, (6, 2, 5, side, side, 3), generator=noise, dtype=torch.uint8)
    write_tensors(target / "geometry.safetensors", tensors)
    write_json(target / "run.json", told)
    return target


@pytest.mark.parametrize("side", [32, 96])
def test_the_page_of_a_long_run_stays_small(place, runs, side):
    assert write_report(long(runs["digits"], place, side)).stat().st_size < LIMIT


def test_pages_name_the_papers_that_they_cite_and_no_others(runs):
    """As docs/conventions.md names them."""
    conventions = (Path(__file__).parents[1] / "docs" / "conventions.md").read_text(encoding="utf-8")
    for name, paper in SOURCES.items():
        (row,) = [line for line in conventions.splitlines() if line.startswith(f"| [{name}] |")]
        author, _, title = paper.partition(" et al. ")
        year, title, place = title[:4], title[6:].rpartition(", ")[0], paper.rpartition(", ")[2]
        assert all(part in row for part in (author, year, title, place)), name
    write_report(runs["digits"])
    page = text_of(runs["digits"])
    assert "Sources: [GEO] Chen et al. 2023" in page
    assert SOURCES["REG"] in page
    assert "[RODS]" not in page


def test_pages_say_what_their_runs_found(runs):
    write_report(runs["encode"])
    found = record(runs["encode"])["results"]["table"][-1]["round trip"]
    assert estimated(found).rounded() in text_of(runs["encode"])
    assert "gaussian:digits8 and mixture:digits8" in text_of(runs["encode"])
    assert "No sign of replayed training data" in text_of(runs["audit"])
    when = record(runs["audit"])["results"]["settling"]["apart"]["median sigma"]
    drawn = {figure.name: figure.drawings[0] for figure in audit_page(runs["audit"], record(runs["audit"])).figures}
    assert [mark.at for mark in drawn["settling"].marks if "new" in mark.text] == [when]
    assert "differs to the end" in text_of(runs["audit"])
    shown = text_of(runs["digits"])
    assert "by chance: random smooth curves" in shown
    assert "gaussian:digits8 and mixture:digits8" in shown


def test_figures_are_written_by_the_commands(place, runs):
    out = place / "commanded"
    words = ("geometry", "mixture:ring8", "--steps", 8, "--count", 3, "--figures", "png", "--out", out)
    result = fanal(*words)
    assert result.exit_code == 0, result.output
    figures = {figure.name for figure in page_of(out).figures}
    assert {path.stem for path in (out / "figures").glob("*.png")} == figures
    told = (out / "figures" / "pca-ratios.tex").read_text(encoding="utf-8")
    assert "mixture:ring8" in told
    assert refused(fanal(*words[:-3], "gif", "--out", place / "never"), "gif", "pdf, png, svg")
    assert not (place / "never").exists()
    files = write_figures(runs["audit"], ["pdf"])
    assert {file.name for file in files if file.suffix == ".pdf"} == {"copies.pdf", "pairs.pdf", "settling.pdf"}
    folder = runs["encode"]
    (folder / "report.html").unlink(missing_ok=True)
    result = fanal("report", folder, "--figures", "svg")
    assert result.exit_code == 0, result.output
    assert (folder / "report.html").is_file()
    assert {path.name for path in (folder / "figures").glob("*.svg")} == {"round-trip.svg", "solvers.svg", "codes.svg"}


def test_what_has_no_page_is_refused(place, runs):
    folder = shutil.copytree(runs["points"], place / "other")
    told = read_json(folder / "run.json")
    for change, words in (
        ({"command": "schedule"}, ("no page", "geometry")),
        ({"command": ["geometry"]}, ("no page",)),
        ({"command": None}, ("no page",)),
        ({"results": {}}, ("not a whole run of fanal geometry",)),
        ({"results": {**told["results"], "bands": {}}}, ("not a whole run of fanal geometry",)),
        ({"config": {}}, ("not a whole run of fanal geometry",)),
    ):
        write_json(folder / "run.json", told | change)
        assert refused(fanal("report", folder), *words)
    assert refused(fanal("report", place / "nowhere"), "no such folder", "--out")
    assert refused(fanal("report", folder / "run.json"), "but a file", "other")
    write_json(folder / "run.json", {key: value for key, value in told.items() if key != "results"})
    with pytest.raises(FanalError, match="unfinished"):
        write_report(folder)


def shown(page, selector):
    """The color in the middle of an element, as it is drawn."""
    picture = Image.open(io.BytesIO(page.locator(selector).first.screenshot())).convert("RGB")
    return picture.getpixel((picture.width // 2, picture.height // 2))


def luminance(color):
    parts = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page, selector):
    """Ratio of the contrast of an element's text, or of a drawing's, with the page ([WCAG] 1.4.3)."""
    style = f"getComputedStyle(document.querySelector({selector!r}))"
    ink = page.evaluate(f"{style}.fill.startsWith('rgb(0, 0, 0)') ? {style}.color : {style}.fill")
    pair = luminance(ink), luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    return (max(pair) + 0.05) / (min(pair) + 0.05)


def opened(browser, folder, last):
    """A page on a phone in the dark, without a complaint and without a network."""
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
    page.set_default_timeout(180_000)  # drawing in software takes long on a busy machine
    complaints, requests = [], []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((folder / "report.html").absolute().as_uri(), wait_until="load")
    page.wait_for_selector(last)
    assert complaints == []
    assert all(url.startswith(("data:", "blob:")) for url in requests[1:])
    assert page.evaluate("[...document.images].filter(i => !i.complete || i.naturalWidth === 0).length") == 0
    return page


@pytest.mark.browser
@pytest.mark.parametrize(
    ("name", "last"),
    [("digits", "#spectra .main-svg"), ("audit", "#settling-2 .main-svg"), ("encode", "#round-trip .main-svg")],
)
def test_pages_are_read_on_a_phone_in_light_and_in_dark(browser, runs, name, last):
    write_report(runs[name])
    page = opened(browser, runs[name], last)
    for scheme, back in (("dark", "rgb(20, 25, 31)"), ("light", "rgb(255, 255, 255)")):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == back
        for selector in ("body", "figcaption", "th", f"{last} .xtitle", f"{last} .xtick text"):
            assert contrast(page, selector) > 4.5, (scheme, selector)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    wide = page.evaluate("[...document.querySelectorAll('.drawings > div')].map(e => e.getBoundingClientRect().right)")
    assert max(wide) <= 360
    page.close()


@pytest.mark.browser
def test_the_slider_goes_along_the_run(browser, place, runs):
    folder = shutil.copytree(runs["digits"], place / "slid")
    tensors, _ = read_tensors(folder / "geometry.safetensors")
    k, n = tensors["strip"].shape[:2]
    gray = torch.arange(n, dtype=torch.uint8) * 10 + 5  # step i of run b is of its own gray
    for name, plus in (("strip", 0), ("strip_x", 3)):
        level = gray[None] + plus + torch.arange(k, dtype=torch.uint8)[:, None] * 0
        tensors[name] = level[:, :, None, None, None].expand(tensors[name].shape).contiguous()
    write_tensors(folder / "geometry.safetensors", tensors)
    write_report(folder)
    page = opened(browser, folder, "#strips .frame")
    begun = int((tensors["strip_sigmas"] - 1).abs().argmin())  # where predictions and states differ
    assert 0 < begun < n - 1
    assert shown(page, "#strips .layer-1") == (int(gray[begun]),) * 3
    assert page.locator("#strips output").inner_text() == f"sigma {float(tensors['strip_sigmas'][begun]):.3g}"
    for step in (n - 1, 0, n // 2):
        page.locator("#strips input").evaluate(f"e => {{ e.value = {step}; e.dispatchEvent(new Event('input')); }}")
        assert page.locator("#strips output").inner_text() == f"sigma {float(tensors['strip_sigmas'][step]):.3g}"
        assert shown(page, "#strips .layer-1") == (int(gray[step]),) * 3
        assert shown(page, "#strips .layer-0") == (int(gray[step]) + 3,) * 3
    page.close()
