"""`fanal interpolate`: paths are samples of their seeds, and runs resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import fanal as library
import pipelines
from fanal.datasets import DATASETS
from fanal.errors import FanalError
from fanal.interpolation import slerp
from fanal.interpolation.command import InterpolationConfig, interpolate, nearest, parse_seeds
from fanal.seeding import noise
from toys import fanal, part_of, record, refused, same, samples, tiny


def told(*words):
    result = fanal(*words)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A tiny network on the digits' shape, whose card names them."""
    path = tmp_path_factory.mktemp("net") / "model"
    tiny(path, shape=(1, 8, 8), classes=10, card={"data": "digits8"})
    return str(path)


def test_the_ends_of_a_path_are_the_samples_of_its_seeds(tmp_path):
    shown = told("interpolate", "mixture:grid2", "--from", "3,0", "--to", "5,7", "--points", 5, "--steps", 8,
                 "--out", tmp_path / "path")  # fmt: skip
    told("sample", "mixture:grid2", "--count", 8, "--steps", 8, "--out", tmp_path / "plain")
    path, plain = samples(tmp_path / "path"), samples(tmp_path / "plain")
    assert path["x"].shape == (10, 2)
    torch.testing.assert_close(path["x"][[0, 4, 5, 9]], plain["x"][[3, 5, 0, 7]], rtol=0, atol=1e-6)
    assert path["weight"].tolist() == [0, 0.25, 0.5, 0.75, 1] * 2
    assert path["path"].tolist() == [0] * 5 + [1] * 5
    grid = library.schedules.polynomial(8)
    a, b = (noise((2,), seeds, dtype=torch.float64) for seeds in ([3, 0], [5, 7]))
    middle = (80 * slerp(a, b, 0.5)).float()
    wanted = library.sample(library.load("mixture:grid2"), middle, grid, library.solvers.Euler())
    torch.testing.assert_close(path["x"][[2, 7]], wanted, rtol=0, atol=1e-6)
    verdict = DATASETS["grid2"].verify(path["x"])
    assert torch.equal(path["verdict"], verdict)
    run = record(tmp_path / "path")
    assert run["network"] == {"calls": 8, "evaluations": 80}
    assert run["config"]["start"] == [3, 0]
    for i, row in enumerate(run["results"]["along"]):
        assert row["weight"] == i / 4
        assert row["wrong"]["value"] == float((verdict[[i, i + 5]] != 0).double().mean())
        seen = DATASETS["grid2"].measure(path["x"][[i, i + 5]])
        values = {name: found["value"] for name, found in row.get("seen", {}).items()}
        assert values == {name: float(seen[name].double().mean()) for name in DATASETS["grid2"].features}
    assert "wrong samples" in shown
    assert "0.250" in shown
    assert {p.name for p in (tmp_path / "path").iterdir()} == {"run.json", "samples.safetensors", "samples.png"}
    assert refused(fanal("report", tmp_path / "path"), "has no page")


def test_neighbors_are_the_nearest_training_samples(tmp_path, net):
    told("interpolate", net, "--from", 0, "--to", 1, "--points", 3, "--steps", 3, "--label", 4, "--neighbors", 2,
         "--out", tmp_path / "path")  # fmt: skip
    found = samples(tmp_path / "path")
    real = DATASETS["digits8"].data("train").x
    by_hand = (found["x"].double()[:, None] - real.double()[None]).flatten(2).norm(dim=2)
    assert torch.equal(found["neighbor"], by_hand.argsort(1)[:, :2])
    torch.testing.assert_close(found["neighbor_distance"].double(), by_hand.sort(1).values[:, :2])
    results = record(tmp_path / "path")["results"]
    assert results["neighbors"] == {"data": "digits8", "split": "train", "count": len(real)}
    assert results["along"][1]["nearest"]["value"] == pytest.approx(float(by_hand[1].min()), rel=1e-6)
    picture = Image.open(tmp_path / "path" / "samples.png")
    assert picture.size == (3 * 72, 3 * 72)  # three points, and two rows of neighbors under them
    below = np.asarray(picture.convert("L"))[72 + 4 : 72 + 68 : 8, 4:68:8]
    want = library.pictures.to_bytes(real[found["neighbor"][0, 0]])[0].numpy()
    assert np.array_equal(below, want)


def test_a_sample_is_its_own_nearest_neighbor():
    real = noise((3, 4), range(50))
    index, distance = nearest(real[[7, 31]], real, 1)
    assert index.tolist() == [[7], [31]]
    assert distance.tolist() == [[0.0], [0.0]]


def test_blocks_and_an_interruption_change_nothing(tmp_path, net):
    config = InterpolationConfig(
        net, (0, 1, 2), (5, 6, 7), points=4, steps=3, label=2, block=5, solver="churn:s_churn=2"
    )
    whole = interpolate(config, tmp_path / "whole")

    def stopping(items, what):
        for i, item in enumerate(items):
            if i == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        interpolate(config, tmp_path / "run", progress=stopping)
    assert len(list(part_of(tmp_path / "run").glob("block-*"))) == 2
    assert not (tmp_path / "run").exists()
    again = interpolate(config, tmp_path / "run")
    assert same(samples(whole), samples(again))
    x = samples(whole)["x"]
    plain = noise((1, 8, 8), [0, 5], 80.0)
    seeds = (0, 0)  # both ends of the first path draw the noise of its first seed
    wanted = library.sample(
        library.load(net, labels=2), plain, library.schedules.polynomial(3), library.solvers.Churn(s_churn=2), seeds
    )
    torch.testing.assert_close(x[[0, 3]], wanted, rtol=1e-4, atol=1e-4)


def test_a_path_of_latents_that_starts_at_infinite_sigma(tmp_path, monkeypatch):
    """Stable Diffusion 3, tiny: unit noise in, pictures out; the ends are those of `fanal sample`."""
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    pipelines.make_sd3().save_pretrained("sd3")
    words = ("diffusers:sd3", "--steps", 2, "--prompt", "a red dog", "--guidance", 3, "--out")
    told("interpolate", *words, "path", "--from", 0, "--to", 1, "--points", 3, "--method", "in_distribution")
    told("sample", *words, "plain", "--count", 2)
    told("sample", "diffusers:sd3", "--steps", 1, "--prompt", "a red dog", "--count", 1, "--out", "one")
    assert float(samples("one")["risk"]) > 0  # a step from infinite sigma alone
    path, plain = samples("path"), samples("plain")
    text = (tmp_path / "path" / "run.json").read_text(encoding="utf-8")
    results = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))["results"]
    assert results["sigmas"][0] == "inf"
    assert results["along"][0]["start_variance"]["se"] is None  # one path has no spread
    assert path["image"].dtype == torch.uint8
    assert path["image"].ndim == 4
    torch.testing.assert_close(path["x"][[0, 2]], plain["x"], rtol=1e-4, atol=1e-4)
    assert int((path["image"][[0, 2]].int() - plain["image"].int()).abs().max()) <= 1
    assert refused(
        fanal("interpolate", *words, "more", "--from", 0, "--to", 1, "--neighbors", 1, "--data", "digits8"),
        "digits8 has samples of shape (1, 8, 8), and diffusers:sd3 makes (3,",
    )


def test_seeds_are_read_from_text():
    assert parse_seeds("3") == (3,)
    assert parse_seeds("3,8") == (3, 8)
    assert parse_seeds("0..3,9") == (0, 1, 2, 3, 9)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--from", "x", "--to", 1), ["seeds are whole numbers", "'x'"]),
        (("--from", "0..", "--to", 1), ["seeds are whole numbers"]),
        (("--from", "5..2", "--to", 1), ["a range of seeds ascends", "5..2"]),
        (("--from", "0..999999999999", "--to", 1), ["at most 100000 seeds"]),
        (("--from", f"0..{10**19}", "--to", 1), ["at most 100000 seeds"]),
        (("--from", "1" * 5000, "--to", 1), ["seeds are whole numbers"]),
        (("--from", "-1", "--to", 1), ["seeds are whole numbers"]),
        (("--from", 2**64, "--to", 1), ["[0, 2^64)"]),
        (("--from", "0,1", "--to", 1), ["two seeds", "2 to start from, 1 to end at"]),
        (("--from", 0, "--to", 1, "--method", "slurp"), ["unknown interpolation 'slurp'", "'slerp'"]),
        (("--from", 0, "--to", 1, "--data", "grid2"), ["--neighbors 3"]),
        (("--from", 0, "--to", 1, "--neighbors", 1, "--data", "digits8"), ["(1, 8, 8)", "makes (2,)"]),
        (("--from", 0, "--to", 1, "--neighbors", 200000), ["asked for 200000 neighbors"]),
        (("--from", 0, "--to", 1, "--solver", "eulr"), ["unknown solver"]),
        (("--from", 0, "--to", 1, "--label", 1), ["takes no class labels"]),
    ],
)
def test_refusals(tmp_path, words, parts):
    out = tmp_path / "run"
    assert refused(fanal("interpolate", "mixture:grid2", *words, "--steps", 2, "--out", out), *parts)
    assert not out.exists()
    assert not part_of(out).exists()


def test_a_model_without_data_has_no_neighbors_until_they_are_named(tmp_path):
    words = ("interpolate", "mixture:ring8", "--from", 0, "--to", 1, "--steps", 2, "--neighbors", 1)
    assert refused(fanal(*words, "--out", tmp_path / "run"), "names no data set", "--data folder:DIR")
    told(*words, "--data", "grid2", "--out", tmp_path / "run")
    assert samples(tmp_path / "run")["neighbor"].shape == (9, 1)
    config = InterpolationConfig("mixture:ring8", (0,), (1,), steps=2)
    with pytest.raises(FanalError, match="holds a finished run"):
        interpolate(config, tmp_path / "run")
    with pytest.raises(FanalError, match="at least 2 points"):
        InterpolationConfig("mixture:ring8", (0,), (1,), points=1)
