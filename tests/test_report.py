"""The page of a run: it opens offline in a real browser, and says what the record says."""

from __future__ import annotations

import html
import re
import shutil

import pytest
import torch

from fanal import pictures
from fanal.errors import FanalError
from fanal.files import read_json, write_json
from fanal.generation import SampleConfig, generate
from fanal.report import headline, table, write_report
from toys import fanal, record, samples, tiny

COUNT = 24


@pytest.fixture(scope="module")
def hands(tmp_path_factory):
    """A small run on images, judged, flagged, repaired twice, with trajectories."""
    config = SampleConfig("hands32", count=COUNT, block=12, guard=("redo", "renoise"), trajectory=True)
    folder = generate(config, tmp_path_factory.mktemp("report") / "run")
    found = samples(folder)
    for name in ("flagged", "verdict"):  # both kinds, or little is shown
        assert 0 < int((found[name] != 0).sum()) < COUNT
    return folder


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """A small run on points of the plane."""
    config = SampleConfig("mixture:grid2", steps=10, count=150, block=75, guard=("redo",), trajectory=True)
    return generate(config, tmp_path_factory.mktemp("points") / "run")


@pytest.fixture(scope="module")
def unjudged(tmp_path_factory):
    """A run without guard or verifier."""
    place = tmp_path_factory.mktemp("unjudged")
    tiny(place / "model")
    return generate(SampleConfig(str(place / "model"), steps=6, count=5, trajectory=True), place / "run")


def _bad(message):
    """Whether the page complains: warnings of the driver that draws without a graphics card are not the page's."""
    return message.type == "error" or (message.type == "warning" and "WebGL" not in message.text)


class Visit:
    """A page as the browser saw it: its complaints and its requests."""

    def __init__(self, browser, path, **look):
        self.complaints, self.requests = [], []
        self.page = browser.new_page(**look)
        self.page.set_default_timeout(120_000)  # drawing in software takes long on a busy machine
        self.page.on("console", lambda m: self.complaints.append(m.text) if _bad(m) else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(request.url[:80]))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.absolute().as_uri(), wait_until="load")

    def cells(self, k):
        """The words of a table, row by row, the head first."""
        rows = self.page.locator("table").nth(k).locator("tr").all()
        return [row.locator("th, td").all_inner_texts() for row in rows]

    def count(self, selector):
        return self.page.locator(selector).count()


def visited(browser, folder):
    visit = Visit(browser, folder / "report.html")
    assert visit.complaints == []
    assert visit.requests[0].startswith("file://")
    assert all(url.startswith(("data:", "blob:")) for url in visit.requests[1:])
    broken = visit.page.evaluate("[...document.images].filter(i => !i.complete || i.naturalWidth === 0).length")
    assert broken == 0
    return visit


@pytest.mark.browser
def test_the_page_opens_without_a_complaint_and_without_a_network(browser, hands):
    visit, told, found = visited(browser, hands), record(hands), samples(hands)
    assert visit.cells(0) == [table(told["results"])[0], *table(told["results"])[1]]
    verdicts = told["results"]["verdicts"]
    assert visit.cells(1)[0] == ["method", *verdicts]
    assert [row[1:] for row in visit.cells(1)[1:]] == [
        [str(int((found[name] == code).sum())) for code in range(len(verdicts))]
        for name in ("verdict", "verdict.redo", "verdict.renoise")
    ]
    assert visit.count(".tiles figure") == 3 * COUNT
    assert visit.count("figure.flagged") == 3 * told["results"]["flagged"]
    wrong = sum(int((found[name] != 0).sum()) for name in ("verdict", "verdict.redo", "verdict.renoise"))
    assert visit.count("figcaption.bad") == wrong
    assert visit.count("figcaption.good") == 3 * COUNT - wrong
    assert visit.page.evaluate("document.images.length") == 3 * COUNT
    assert visit.count(".film") == 2
    wrong_first = int((found["verdict"] != 0).sum())
    lines = visit.page.evaluate("document.getElementById('risk-lines').data.length")
    assert lines == COUNT
    assert visit.count("#risk-lines .scatterlayer .trace path.js-line") == COUNT
    drawn = visit.page.evaluate("document.getElementById('risk-histogram').data.map(t => Array.from(t.y))")
    assert sorted(sum(heights) for heights in drawn) == sorted([wrong_first, COUNT - wrong_first])
    visit.page.close()


@pytest.mark.browser
def test_pages_of_points_and_of_unjudged_runs_open_too(browser, points, unjudged):
    visit = visited(browser, points)
    assert len(visit.cells(0)) == 3
    assert visit.page.evaluate("document.images.length") == 2
    assert visit.count(".tiles figure") == 0
    assert "The first" not in visit.page.inner_text("body")  # every point is drawn
    visit.page.close()
    visit = visited(browser, unjudged)
    assert visit.count("table") == 1
    assert len(visit.cells(0)) == 2
    assert visit.count(".tiles figure") == 5
    assert visit.count("figure.flagged") == visit.count("figcaption.good, figcaption.bad") == 0
    assert "the run had no guard" in visit.page.inner_text("body")
    visit.page.close()


@pytest.mark.browser
def test_the_curves_are_the_risks(browser, hands):
    visit = Visit(browser, hands / "report.html")
    drawn = visit.page.evaluate("document.getElementById('risk-lines').data.map(t => Array.from(t.y))")
    found = samples(hands)
    wrong = found["verdict"] != 0
    order = torch.cat([(~wrong).nonzero().flatten(), wrong.nonzero().flatten()])
    assert torch.allclose(torch.tensor(drawn, dtype=torch.float64), found["per_step"][order], rtol=1e-12)
    threshold = record(hands)["results"]["calibration"]["threshold"]
    assert visit.page.evaluate("document.getElementById('risk-lines').layout.shapes[0].y0") == threshold
    visit.page.close()


def text_of(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    body = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S)
    return html.unescape(re.sub(r"<[^>]+>", " ", body))


def test_the_words_are_those_of_the_terminal(hands, points, unjudged):
    for folder in (hands, points, unjudged):
        told, text = record(folder), text_of(folder)
        for line in headline(told):
            assert line in text
        for row in table(told["results"])[1]:
            for cell in row:
                assert cell in text


def test_the_pictures_are_the_samples_in_their_order(hands):
    found, page = samples(hands), (hands / "report.html").read_text(encoding="utf-8")
    shown = re.findall(r'<figure [^>]*><img src="([^"]+)"', page)
    batches = (found["before"], found["x"], found["x.renoise"])
    assert shown == [pictures.data_uri(pictures.single(x[None], 0)) for batch in batches for x in batch]
    titles = re.findall(r'<figure [^>]*title="seed (\d+), risk ([^,"]+)', page)
    risks = torch.cat([found["risk"], found["risk.redo"], found["risk.renoise"]])
    assert titles == [(str(k % COUNT), f"{float(risk):.3g}") for k, risk in enumerate(risks)]


def test_the_headline_counts_what_the_tensors_say(hands):
    found, lines = samples(hands), "\n".join(headline(record(hands)))
    assert f"{int((found['verdict'] != 0).sum())} of {COUNT} are wrong" in lines
    caught = int((found["flagged"].bool() & (found["verdict"] != 0)).sum())
    assert f"flagged {int(found['flagged'].sum())}, {caught} of the wrong ones among them" in lines
    for name, words in (("redo", r"lower temperature\)"), ("renoise", r"fresh noise\)")):
        assert re.search(rf"{words}: {int((found[f'verdict.{name}'] != 0).sum())} wrong", lines)


def test_the_table_has_every_figure_with_its_error():
    results = {
        "verdicts": ["ok", "bad"],
        "table": [
            {
                "name": "plain",
                "wrong": {"value": 0.25, "se": 0.05, "n": 64},
                "spread": {"value": 0.9, "se": 0.01, "n": 64},
                "evaluations": {"value": 40.0, "se": 0.0, "n": 64},
                "seconds": {"value": 0.0301, "se": None, "n": 1},
            },
            {
                "name": "redo",
                "wrong": {"value": 0.125, "se": 0.04, "n": 64},
                "corrected": {"value": None, "se": None, "n": 0},
                "newly_wrong": {"value": 0.0, "se": 0.02, "n": 64},
                "spread": {"value": 0.85, "se": 0.01, "n": 64},
                "evaluations": {"value": 54.2, "se": 2.4, "n": 64},
                "seconds": {"value": 0.05, "se": 0.001, "n": 2},
            },
        ],
    }
    head, rows = table(results)
    plain, redo = (dict(zip(head, row, strict=True)) for row in rows)
    wanted = {"wrong": "25.0 ± 5.0 %", "corrected": "–", "newly wrong": "–", "spread": "0.90 ± 0.01"}
    wanted |= {"method": "plain", "calls per sample": "40.0 ± 0.0", "seconds per sample": "0.0301"}
    assert plain | wanted == plain
    wanted = {"wrong": "12.5 ± 4.0 %", "corrected": "–", "newly wrong": "0.0 ± 2.0 %", "spread": "0.85 ± 0.01"}
    wanted |= {"calls per sample": "54.2 ± 2.4", "seconds per sample": "0.0500 ± 0.0010"}
    assert redo | wanted == redo


def test_the_strips_show_one_good_and_one_bad_sample(hands, points):
    found, text = samples(hands), text_of(hands)
    wrong = found["verdict"] != 0
    first = record(hands)["seeds"]["first"]
    for mask, word, best in ((wrong, "wrong", torch.argmax), (~wrong, "good", torch.argmin)):
        rows = mask.nonzero().flatten()
        assert re.search(rf"{word}, [a-z ]+: seed {first + int(rows[best(found['risk'][rows])])}, risk", text)
    assert "How they came about" not in text_of(points)


def test_a_hostile_name_stays_a_name(tmp_path, hands):
    folder = tmp_path / "run"
    shutil.copytree(hands, folder)
    told, evil = read_json(folder / "run.json"), "<script>alert('x')</script><img src=http://evil.example/x.png>"
    told["config"]["model"] = told["versions"]["torch"] = evil
    told["results"]["verdicts"] = [evil for _ in told["results"]["verdicts"]]
    write_json(folder / "run.json", told)
    write_report(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<img src=http" not in page
    assert html.escape(evil) in page or "&lt;script&gt;alert" in page


def test_the_report_command_writes_the_page_again(tmp_path, hands):
    folder = tmp_path / "run"
    shutil.copytree(hands, folder)
    before = (folder / "report.html").read_text(encoding="utf-8")
    (folder / "report.html").unlink()
    result = fanal("report", folder)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == f"report: {folder / 'report.html'}"

    def without_names(text):
        return re.sub(r"<script>.*?</script>", "", text, flags=re.S)

    assert without_names((folder / "report.html").read_text(encoding="utf-8")) == without_names(before)


@pytest.mark.parametrize("lost", ["run.json", "samples.safetensors", "sigmas"])
def test_a_run_with_something_missing_is_refused_and_its_page_stays(tmp_path, hands, lost):
    folder = tmp_path / "run"
    shutil.copytree(hands, folder)
    if lost == "sigmas":
        told = read_json(folder / "run.json")
        del told["results"]["sigmas"]
        write_json(folder / "run.json", told)
    else:
        (folder / lost).unlink()
    page = (folder / "report.html").read_bytes()
    with pytest.raises(FanalError):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == page


def test_a_calibration_without_an_error_of_its_auc_can_be_told(tmp_path, points):
    folder = tmp_path / "run"
    shutil.copytree(points, folder)
    told = read_json(folder / "run.json")
    told["results"]["calibration"] |= {"auc": 0.75, "auc_se": None}
    write_json(folder / "run.json", told)
    write_report(folder)
    assert "on those samples its AUC was 0.750." in re.sub(r"\s+", " ", text_of(folder))
