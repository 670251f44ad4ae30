"""The labeling page: what it serves, to whom, and how a person uses it in a browser."""

from __future__ import annotations

import http.client
import io
import json
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

import labeled
from fanal import pictures
from fanal.errors import FanalError
from fanal.files import read_json
from fanal.generation import SampleConfig, generate
from fanal.labeling import LabelServer, open_labels, read_samples, summarize
from labeled import COUNT, read_labels, samples_verdicts
from toys import fanal, samples

# Fixtures
hands = labeled.hands
run = labeled.run


# The server


@contextmanager
def served(run, spec=None, **options):
    found = read_samples(run)
    server = LabelServer(found, open_labels(found, spec), **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def asked(server, path, body=None, *, method=None, token=None, **headers):
    """Ask the server, as a client that need not be a browser; returns the status, the head and the body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    start = f"/{server.token if token is None else token}"
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    heads = {"Content-Type": "application/json"} if data is not None else {}
    heads |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method or ("GET" if data is None else "POST"), start + path, data, heads)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_the_page_is_on_this_machine_behind_a_token(run):
    with served(run) as server, served(run) as other:
        assert server.server_address[0] == "127.0.0.1"
        assert server.url == f"http://127.0.0.1:{server.server_port}/{server.token}/"
        assert server.token != other.token
        assert len(server.token) >= 22  # 128 bits
        status, heads, body = asked(server, "/")
        assert (status, heads["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert "default-src 'none'" in heads["Content-Security-Policy"]
        assert heads["Cache-Control"] == "no-store"
        assert server.token.encode() not in body


@pytest.mark.parametrize("token", ["", "x", "%00", "..", "%C3%A9", "a" * 5000])
def test_a_wrong_token_opens_nothing(run, token):
    with served(run) as server:
        for path in ("/", "/state", "/image/0.png"):
            assert asked(server, path, token=token)[0] == 404
        assert asked(server, "/label", {"position": 0, "code": 0}, token=token)[0] == 404
        assert asked(server, "", token=server.token)[0] == 404  # no slash
        assert server.labels.codes == {}


def test_other_names_and_other_pages_are_turned_away(run):
    with served(run) as server:
        label = {"position": 0, "code": 0}
        assert asked(server, "/state", Host=f"evil.example:{server.server_port}")[0] == 403
        assert asked(server, "/state", Host="127.0.0.1")[0] == 403
        assert asked(server, "/label", label, Origin="https://evil.example")[0] == 403
        assert asked(server, "/label", label, Origin="null")[0] == 403
        assert server.labels.codes == {}
        assert asked(server, "/label", label, Origin=f"http://localhost:{server.server_port}")[0] == 200
        assert asked(server, "/state", Host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/run.json",
        "/../run.json",
        "/../../../../etc/passwd",
        "/%2e%2e/run.json",
        "/image/../run.json",
        "/image/-1.png",
        f"/image/{COUNT}.png",
        "/image/1e1.png",
        "/image/%D9%A3.png",
        "/image/9999999999999.png",
        "/image/0.png/x",
        "/page.html.bak",
        "/labels.py",
        "//",
    ],
)
def test_there_is_nothing_but_the_page(run, path):
    with served(run) as server:
        assert asked(server, path)[0] == 404
        assert asked(server, path, {})[0] == 404


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 3000,
        b'{"position": ' + b"9" * 4000 + b"}",
        {},
        {"position": 0},
        {"position": 0, "code": 0, "more": 1},
        {"position": -1, "code": 0},
        {"position": COUNT, "code": 0},
        {"position": 0.0, "code": 0},
        {"position": True, "code": 0},
        {"position": "0", "code": 0},
        {"position": None, "code": 0},
        {"position": 0, "code": -1},
        {"position": 0, "code": 6},
        {"position": 0, "code": True},
        {"position": 0, "code": "right"},
        {"position": 0, "code": [0]},
    ],
)
def test_bad_labels_are_refused_and_change_nothing(run, body):
    with served(run) as server:
        status, _, answer = asked(server, "/label", body)
        assert status == 400
        assert json.loads(answer)["error"]
        assert server.labels.codes == {}
        assert not (run / "labels.json").exists()
        assert asked(server, "/label", {"position": 0, "code": 0})[0] == 200  # and it still works


def test_requests_that_are_no_labels_are_refused(run):
    with served(run) as server:
        label = {"position": 0, "code": 0}
        assert asked(server, "/label", label, Content_Type="text/plain")[0] == 400  # what a foreign form could send
        assert asked(server, "/label", label, Content_Length="9" * 30)[0] == 400
        assert asked(server, "/label", label, Content_Length="-1")[0] == 400
        assert asked(server, "/label", json.dumps(label).encode() + 5000 * b" ")[0] == 400
        assert asked(server, "/undo", {"all": True})[0] == 400
        assert asked(server, "/label", label, method="PUT")[0] == 501
        assert server.labels.codes == {}


def test_the_picture_is_the_sample_pixel_by_pixel(run):
    with served(run) as server:
        for position in (0, 7, COUNT - 1):
            status, heads, body = asked(server, f"/image/{position}.png")
            assert (status, heads["Content-Type"]) == (200, "image/png")
            image = torch.from_numpy(np.array(Image.open(io.BytesIO(body)).convert("L")))
            sample = server.samples.x[server.labels.order[position]]
            assert torch.equal(image, pictures.to_bytes(sample)[0])


def test_the_page_knows_neither_risk_nor_verdict_nor_sample(run):
    with served(run) as server:
        asked(server, "/label", {"position": 2, "code": 1})
        asked(server, "/label", {"position": 0, "code": None})
        state = json.loads(asked(server, "/state")[2])
        assert state.keys() == {"run", "classes", "keys", "labels"}
        assert state["labels"] == [-1, -2, 1] + (COUNT - 3) * [-2]
    with served(run, show_risk=True) as server:
        state = json.loads(asked(server, "/state")[2])
        risk = samples(run)["risk"]
        assert state["risks"] == [float(risk[sample]) for sample in server.labels.order]


def test_points_are_shown_among_the_others(tmp_path):
    folder = generate(SampleConfig("mixture:ring8", steps=6, count=9, block=9), tmp_path / "points")
    with served(folder) as server:
        assert server.labels.taxonomy.name == "hands"  # no verifier judged this run
        image = Image.open(io.BytesIO(asked(server, "/image/4.png")[2])).convert("RGB")
        flag = tuple(int(pictures.COLORS["flag"][k : k + 2], 16) for k in (1, 3, 5))
        place = np.argwhere((np.array(image) == flag).all(axis=-1)).mean(axis=0)
        points = server.samples.x
        x, y = (points[server.labels.order[4]] / points.abs().max() / 1.05 + 1).tolist()
        assert place == pytest.approx([511 * (1 - y / 2), 511 * x / 2], abs=1.5)
        server.labels.set(0, 3)
        assert summarize(server.samples, server.labels).verifier is None


def test_labels_at_the_same_moment_are_all_kept(run):
    with served(run) as server:
        posts = [
            threading.Thread(target=asked, args=(server, "/label", {"position": k, "code": k % 6}))
            for k in range(COUNT)
        ]
        for post in posts:
            post.start()
        for post in posts:
            post.join()
        assert read_labels(run / "labels.json") == {server.labels.order[k]: k % 6 for k in range(COUNT)}
        assert json.loads(asked(server, "/undo", {})[2])["position"] is not None
        assert len(read_json(run / "labels.json")["labels"]) == COUNT - 1


def test_a_port_that_is_taken_is_named(run):
    with served(run) as server, pytest.raises(FanalError, match=f"port {server.server_port}"):
        LabelServer(server.samples, server.labels, port=server.server_port)


# The command


def test_the_command_serves_until_it_is_stopped(run, monkeypatch):
    def once(server):
        assert asked_later(server) == 200
        raise KeyboardInterrupt

    def asked_later(server):
        thread = threading.Thread(target=LabelServer.handle_request, args=(server,))
        thread.start()
        status = asked(server, "/label", {"position": 0, "code": 1})[0]
        thread.join()
        return status

    monkeypatch.setattr(LabelServer, "serve_forever", once)
    told = fanal("label", run)
    assert told.exit_code == 0
    assert "0 of 16 samples are labeled" in told.output
    assert "http://127.0.0.1:" in told.output
    assert "1 of 16 samples are labeled" in told.output
    assert read_json(run / "labels.json")["labels"] == {str(open_labels(read_samples(run)).order[0]): 1}
    assert not (run / ".labels.json.lock").exists()


# In a browser


class Visit:
    """The page in a browser: what it shows, what it complains about, and where it sends requests."""

    def __init__(self, browser, server, scheme="light", width=1280, height=800):
        self.server, self.complaints, self.requests = server, [], []
        self.context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
        self.page = self.context.new_page()
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(server.url)
        self.page.wait_for_selector("#classes button")
        self.loaded()

    def loaded(self):
        image = "document.getElementById('image')"
        self.until(lambda: self.page.evaluate(f"{image}.complete && {image}.naturalWidth > 0"))

    def until(self, reached):
        """Wait for something; the page's policy forbids to let the browser wait."""
        for _ in range(500):
            if reached():
                return
            self.page.wait_for_timeout(10)
        raise AssertionError(f"nothing happened; the page says {self.page.locator('body').inner_text()!r}")

    def text(self, name):
        return self.page.locator(f"#{name}").inner_text()

    def press(self, *keys):
        """Press keys; after each the page says where it is."""
        for key in keys:
            self.page.keyboard.press(key)
            self.until(lambda: self.page.evaluate("document.body.getAttribute('aria-busy') !== 'true'"))
        self.loaded()
        return self.text("where").split(" · ")

    def close(self):
        assert self.complaints == []
        assert all(url.startswith(self.server.url) or url == "data:," for url in self.requests)
        self.context.close()


@pytest.mark.browser
def test_a_run_is_labeled_by_keys(browser, run):
    with served(run) as server:
        visit, order = Visit(browser, server), server.labels.order
        assert visit.text("where") == "sample 1 of 16"
        assert visit.text("classes").split("\n")[::2] == list("1234560")
        assert visit.text("classes").split("\n")[1::2] == ["right", *samples_verdicts(run)[1:], "unsure"]
        assert visit.press("1") == ["sample 2 of 16"]
        assert read_json(run / "labels.json")["labels"] == {str(order[0]): 0}
        assert visit.press("5", "0") == ["sample 4 of 16"]
        assert visit.text("done") == "3 of 16 labeled"
        assert visit.press("ArrowLeft") == ["sample 3 of 16", "unsure"]
        assert visit.press("ArrowLeft") == ["sample 2 of 16", "missing finger"]
        assert visit.press("2") == ["sample 4 of 16"]  # another opinion, and on to the next open one
        assert visit.press("u") == ["sample 2 of 16", "missing finger"]
        assert visit.press("u") == ["sample 3 of 16"]
        assert visit.press("ArrowRight", "ArrowRight") == ["sample 5 of 16"]
        assert visit.press(*16 * ["ArrowRight"]) == ["sample 16 of 16"]
        assert visit.press(" ") == ["sample 3 of 16"]
        assert visit.press("8", "x", "Control+1") == ["sample 3 of 16"]  # no class has this key
        assert read_json(run / "labels.json")["labels"] == {str(order[0]): 0, str(order[1]): 4}
        visit.close()


@pytest.mark.browser
def test_a_run_is_labeled_by_clicks_to_the_end_and_after_a_break(browser, run):
    with served(run, "faces") as server:
        visit = Visit(browser, server)
        for k in range(4):
            visit.page.get_by_role("button", name="wrong").click()
            visit.until(lambda k=k: visit.text("done").startswith(f"{k + 1} "))
        visit.page.get_by_role("button", name="undo").click()
        visit.until(lambda: visit.text("done").startswith("3 "))
        visit.close()
    with served(run) as server:  # another day
        visit = Visit(browser, server)
        assert visit.text("done") == "3 of 16 labeled"
        assert visit.text("where") == "sample 4 of 16"
        visit.press(*13 * ["1"])
        assert visit.text("done") == "all 16 labeled"
        assert "All samples are labeled" in visit.text("question")
        assert visit.page.locator("#skip").is_disabled()
        visit.close()
    assert sorted(read_labels(run / "labels.json").values()) == 13 * [0] + 3 * [1]


@pytest.mark.browser
def test_the_picture_is_enlarged_without_smoothing_and_fits(browser, run):
    with served(run) as server:
        for scheme, width, height in (("light", 1280, 800), ("dark", 900, 600), ("light", 360, 740)):
            visit = Visit(browser, server, scheme, width, height)
            style = visit.page.evaluate("getComputedStyle(document.getElementById('image')).imageRendering")
            assert style == "pixelated"
            box = visit.page.locator("#image").bounding_box()
            assert min(box["width"], box["height"]) >= 250
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
            for button in visit.page.locator("button").all():
                size = button.bounding_box()
                assert size["height"] >= 44
                assert size["x"] >= 0
                assert size["x"] + size["width"] <= width
            back = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
            light = sum(int(part) for part in back[4:-1].split(","))
            assert (light < 200) == (scheme == "dark")
            visit.close()


@pytest.mark.browser
def test_a_label_that_cannot_be_saved_stays_where_it_is(browser, run, monkeypatch):
    def full(path, value):
        raise FanalError(f"cannot write {path}: no space left on device") from OSError(28, "no space")

    with served(run) as server:
        visit = Visit(browser, server)
        visit.press("1")
        monkeypatch.setattr("fanal.labeling.labels.write_json", full)
        assert visit.press("2") == ["sample 2 of 16"]
        assert "Not saved: cannot write" in visit.text("error")
        monkeypatch.undo()
        assert visit.press("2") == ["sample 3 of 16"]
        assert visit.page.locator("#error").is_hidden()
        assert all("500" in text for text in visit.complaints)  # the browser's own note of the refused request
        visit.complaints.clear()
        visit.close()


@pytest.mark.browser
def test_the_risk_is_shown_only_when_asked_for(browser, run):
    with served(run) as server:
        visit = Visit(browser, server)
        words = visit.page.evaluate("document.documentElement.outerHTML").lower()
        assert "risk" not in words
        visit.close()
    with served(run, show_risk=True) as server:
        visit = Visit(browser, server)
        risk = float(samples(run)["risk"][server.labels.order[0]])
        assert float(visit.text("where").split("risk ")[1]) == pytest.approx(risk, rel=0.01)
        visit.close()
