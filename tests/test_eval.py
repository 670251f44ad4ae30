"""`fanal eval`: the figures are the library's, runs resume, and what does not fit is refused in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import evaluated
from evaluated import HANDS, color, figures, save
from fanal import evaluation, metrics
from fanal.datasets import get
from fanal.errors import FanalError
from fanal.evaluation import EvalConfig, evaluate
from fanal.files import write_tensors
from fanal.metrics import OwnFeatures, Pixels, open_samples, read_captions, read_statistics
from test_metrics_text import tiny  # noqa: F401 (a fixture)
from toys import fanal, part_of, record, refused

# Fixtures
elsewhere = evaluated.elsewhere
hands = evaluated.hands
run = evaluated.run


def agrees(found, wanted, rel=1e-3):
    """Whether a recorded figure is the library's; blocks of another size round otherwise."""
    assert found["value"] == pytest.approx(wanted.value, rel=rel)
    assert found["se"] == pytest.approx(wanted.se, rel=rel)
    return (found["n"], found["n_real"], found["warning"]) == (wanted.n, wanted.n_real, wanted.warning)


# Figures


def test_the_figures_are_the_librarys(tmp_path, run, hands):
    told = fanal(
        "eval", run, "--real", "hands32", "--real-count", 120, "--metric", "fid,kid,pr,dc,sw,mmd", "--out", "e"
    )
    assert told.exit_code == 0, told.output
    own = OwnFeatures()
    x, real = own(hands), own(HANDS.data("held out", 120).x)
    found = figures(tmp_path / "e")
    pairs = {
        "fid": metrics.fid(x, real),
        "kid": metrics.kid(x, real),
        "precision": metrics.precision_recall(x, real)[0],
        "recall": metrics.precision_recall(x, real)[1],
        "density": metrics.density_coverage(x, real)[0],
        "coverage": metrics.density_coverage(x, real)[1],
        "sliced_wasserstein": metrics.sliced_wasserstein(x, real),
        "mmd": metrics.mmd(x, real),
    }
    assert list(found) == list(pairs)
    for name, wanted in pairs.items():
        assert agrees(found[name], wanted), name
    results = record(tmp_path / "e")["results"]
    assert results["features"] == {"name": own.name, "sha256": own.sha256, "per_sample": 64}
    assert results["samples"] == {"source": str(run / "samples.safetensors"), "tensor": "x", "n": 90}
    assert results["real"] == {"source": "hands32", "split": "held out", "n": 120}
    kept = read_statistics(tmp_path / "e" / "stats.safetensors")
    assert (kept.n, kept.extractor, kept.sha256) == (90, own.name, own.sha256)


def test_the_terminal_shows_the_records_figures_and_the_network(tmp_path, run):
    told = fanal("eval", run, "--real", "hands32", "--real-count", 120, "--metric", "pr,mmd", "--out", "e")
    assert f"features: fanal-features32, 64 per sample, sha256 {OwnFeatures().sha256[:12]}" in told.stdout
    found = figures(tmp_path / "e")
    row = next(line for line in told.stdout.splitlines() if line.strip().startswith("precision")).split()
    assert float(row[1]) == pytest.approx(found["precision"]["value"], abs=1e-3)
    assert float(row[2]) == pytest.approx(found["precision"]["se"], abs=1e-3)
    assert row[3:] == ["90", "120"]
    assert told.stdout.strip().splitlines()[-1] == f"run: {tmp_path / 'e'}"


def test_broken_samples_are_seen(tmp_path, run):
    for tensor in ("before", "x"):
        words = ("--tensor", tensor, "--metric", "kid", "--real-count", 300, "--out", tensor)
        assert fanal("eval", run, "--real", "hands32", *words).exit_code == 0
    before, after = (figures(tmp_path / name)["kid"] for name in ("before", "x"))
    assert before["value"] > 3 * before["se"]
    assert abs(after["value"]) < 4 * after["se"]


def test_the_first_repair_has_its_name_too(tmp_path, run):
    for tensor in ("x.redo", "x"):
        assert evaluate(EvalConfig(str(run), "hands32", ("fid",), tensor=tensor, real_count=80), tmp_path / tensor)
    assert figures(tmp_path / "x.redo") == figures(tmp_path / "x")
    assert record(tmp_path / "x.redo")["results"]["samples"]["tensor"] == "x"


def test_decoded_images_go_before_latents(tmp_path):
    images = color(20)
    write_tensors(tmp_path / "s.safetensors", {"x": torch.randn(20, 4, 2, 2), "image": images})
    assert torch.equal(open_samples("s.safetensors").read(3, 7), images[3:7])
    assert open_samples("s.safetensors", tensor="x").read(0, 2).shape == (2, 4, 2, 2)


def test_points_are_compared_as_they_are(tmp_path):
    assert fanal("eval", "grid2", "--count", 200, "--real", "grid2", "--real-count", 300, "--out", "e").exit_code == 0
    grid = get("grid2")
    wanted = metrics.fid(grid.data("train", 200).x, grid.data("held out", 300).x)
    assert agrees(figures(tmp_path / "e")["fid"], wanted, 1e-9)
    assert record(tmp_path / "e")["results"]["features"]["name"] == "pixels"


def test_real_against_real_is_the_floor(tmp_path):
    words = ("--count", 400, "--real", "hands32", "--real-count", 400, "--metric", "fid,kid")
    assert fanal("eval", "hands32", *words, "--out", "e").exit_code == 0
    found = figures(tmp_path / "e")
    assert abs(found["kid"]["value"]) < 4 * found["kid"]["se"]
    assert record(tmp_path / "e")["results"]["samples"]["split"] == "train"
    assert fanal("eval", "hands32", *words, "--samples-split", "held out", "--out", "same").exit_code == 0
    assert figures(tmp_path / "same")["fid"]["value"] < 1e-9
    assert "400 of 400 samples have exactly the features of a real one" in " ".join(
        record(tmp_path / "same")["results"]["warnings"]
    )


# Statistics


def test_a_file_of_statistics_stands_for_its_set(tmp_path, run):
    told = fanal("eval", "--real", "hands32", "--real-count", 150, "--write-stats", "s.safetensors", "--out", "w")
    assert told.exit_code == 0, told.output
    assert "statistics of 150 real samples: s.safetensors" in told.stdout
    assert figures(tmp_path / "w") == {}
    fanal("eval", run, "--real", "s.safetensors", "--out", "a")
    fanal("eval", run, "--real", "hands32", "--real-count", 150, "--out", "b")
    assert figures(tmp_path / "a") == figures(tmp_path / "b")
    assert list(figures(tmp_path / "a")) == ["fid", "kid", "precision", "recall", "density", "coverage"]


def test_moments_alone_give_the_frechet_distance_alone(tmp_path, run):
    words = ("--real", "hands32", "--real-count", 150, "--write-stats", "s.safetensors", "--moments-only", "--out", "w")
    assert fanal("eval", *words).exit_code == 0
    fanal("eval", run, "--real", "s.safetensors", "--out", "a")
    found = figures(tmp_path / "a")
    assert list(found) == ["fid"]
    assert "leaves out" in found["fid"]["warning"]
    fanal("eval", run, "--real", "hands32", "--real-count", 150, "--metric", "fid", "--out", "b")
    assert found["fid"]["value"] == pytest.approx(figures(tmp_path / "b")["fid"]["value"], rel=1e-9)
    told = fanal("eval", run, "--real", "s.safetensors", "--metric", "kid", "--out", "c")
    assert refused(told, "kid needs real features", "only their mean and covariance")


def test_published_statistics_are_taken_on_trust_and_that_is_said(tmp_path, run):
    x = Pixels()(HANDS.data("held out", 1200).x).double().numpy()
    np.savez(tmp_path / "ref.npz", mu=x.mean(0), sigma=np.cov(x.T))
    told = fanal("eval", run, "--real", "ref.npz", "--features", "pixels", "--out", "e")
    assert told.exit_code == 0, told.output
    assert "taken on trust" in told.stdout
    assert figures(tmp_path / "e")["fid"]["n_real"] is None
    told = fanal("eval", run, "--real", "ref.npz", "--out", "f")
    assert refused(told, "different lengths", "64 of", "1024 of ref.npz")


def test_statistics_of_another_extractor_are_refused_before_any_work(tmp_path, run):
    words = ("--real-count", 50, "--features", "pixels", "--write-stats", "s.safetensors", "--out", "w")
    assert fanal("eval", "--real", "hands32", *words).exit_code == 0
    told = fanal("eval", run, "--real", "s.safetensors", "--out", "e")
    assert refused(told, "made with pixels", "different extractors")
    assert not part_of(tmp_path / "e").exists()


# Captions


def test_captions_in_order_by_name_and_by_choice(tmp_path, tiny):  # noqa: F811
    images = color(6, 30)
    save(tmp_path / "p", images)
    texts = ["a cat", "a dog on the mat", "two hands", "the cat .", "two dogs", "on a mat"]
    (tmp_path / "c.txt").write_text("\n".join(texts))
    scores = 100 * metrics.Clip(str(tiny))(images, texts).clamp_min(0)
    told = fanal("eval", "p", "--captions", "c.txt", "--clip", tiny, "--block", 4, "--out", "order")
    assert told.exit_code == 0, told.output
    found = figures(tmp_path / "order")["clip"]
    assert found["value"] == pytest.approx(float(scores.mean()), rel=1e-5)
    assert found["se"] == pytest.approx(float(scores.std()) / 6**0.5, rel=1e-4)
    assert read_captions(tmp_path / "order" / "captions.tsv").texts == tuple(texts)

    mixed = [5, 3, 1, 0, 2, 4]
    rows = [f"{i}\t{texts[i]}" for i in mixed] + ["99\tof another picture"]
    (tmp_path / "c.tsv").write_text("\n".join(rows))
    fanal("eval", "p", "--captions", "c.tsv", "--clip", tiny, "--out", "name")
    assert figures(tmp_path / "name")["clip"]["value"] == pytest.approx(found["value"], rel=1e-5)

    entries = [{"image_id": i, "caption": f"{t} {k}"} for i, t in enumerate(texts) for k in ("", ".")]
    (tmp_path / "c.json").write_text(json.dumps({"annotations": entries}))
    words = ("--captions", "c.json", "--caption-seed", 3, "--count", 6)
    assert fanal("eval", *words, "--write-captions", "chosen.tsv").exit_code == 0
    told = fanal("eval", "p", *words, "--clip", tiny, "--out", "choice")
    assert told.exit_code == 0, told.output
    chosen = read_captions(tmp_path / "chosen.tsv")
    assert (
        chosen
        == read_captions(tmp_path / "choice" / "captions.tsv")
        == metrics.choose_captions(read_captions(tmp_path / "c.json"), 6, 3)
    )
    wanted = metrics.clip_score(metrics.Clip(str(tiny))(images, chosen.texts)).value
    assert figures(tmp_path / "choice")["clip"]["value"] == pytest.approx(wanted, rel=1e-5)


def test_captions_go_with_the_other_figures(tmp_path, run, tiny):  # noqa: F811
    (tmp_path / "c.txt").write_text("a cat\n" * 90)
    words = ("--real", "hands32", "--real-count", 90, "--metric", "fid,clip", "--captions", "c.txt", "--clip", tiny)
    assert fanal("eval", run, *words, "--out", "e").exit_code == 0
    assert list(figures(tmp_path / "e")) == ["fid", "clip"]


# Runs


def test_a_stopped_run_goes_on_and_ends_with_the_same_figures(tmp_path, run, monkeypatch):
    config = EvalConfig(str(run), "hands32", ("fid", "kid"), real_count=70, block=20)
    evaluate(config, tmp_path / "whole")
    calls, compute = [], OwnFeatures.__call__

    def stopping(self, x):
        if len(x) > 1:  # one sample of each side is tried first
            calls.append(len(x))
            if len(calls) == 6:
                raise KeyboardInterrupt
        return compute(self, x)

    monkeypatch.setattr(OwnFeatures, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, tmp_path / "parts")
    said = []
    evaluate(config, tmp_path / "parts", say=said.append)
    assert said == ["resuming: 5 blocks are there already"]
    assert calls == [20, 20, 20, 10, 20, 20, 20, 20, 20, 10]  # the sixth was stopped and done again
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["run.json", "stats.safetensors"]


def test_a_run_whose_samples_changed_is_not_resumed(tmp_path, run, hands, monkeypatch):
    config = EvalConfig(str(run), "hands32", ("fid",), real_count=70, block=20)
    monkeypatch.setattr(evaluation, "_compare", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, tmp_path / "e")
    write_tensors(run / "samples.safetensors", {"x": hands.flip(0)})
    with pytest.raises(FanalError, match="is not what the unfinished run"):
        evaluate(config, tmp_path / "e")


def test_nothing_finished_is_replaced_unasked(tmp_path, run):
    words = ("eval", run, "--real", "hands32", "--real-count", 80, "--metric", "fid", "--out", "e")
    assert fanal(*words, "--write-stats", "s.safetensors").exit_code == 0
    assert refused(fanal(*words), "holds a finished run")
    assert refused(fanal(*words, "--write-stats", "s.safetensors"), "s.safetensors exists", "--overwrite")
    assert fanal(*words, "--write-stats", "s.safetensors", "--overwrite").exit_code == 0


def test_too_few_and_unlike_sets_are_told(tmp_path, run):
    told = fanal("eval", run, "--count", 30, "--real", "hands32", "--real-count", 90, "--metric", "fid", "--out", "e")
    assert "warning: fid: 30 samples are not more than the 64 features" in told.stdout
    assert "warning: the sets differ in size (30 and 90)" in told.stdout
    assert figures(tmp_path / "e")["fid"]["se"] is None


REAL = ("--real", "hands32")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ["nothing to judge"]),
        (("run",), ["nothing to compare with", "--real"]),
        (("run", "--write-stats", "s.safetensors"), ["nothing to compare with"]),
        (("--real", "hands32"), ["nothing to judge"]),
        (("run", "--real", "handz32"), ["unknown samples 'handz32'", "did you mean 'hands32'"]),
        (("run", "--real", "no/where"), ["no/where is no run folder"]),
        (("rnu", *REAL), ["unknown samples 'rnu'"]),
        (("run", *REAL, "--metric", "fdi"), ["unknown metric 'fdi'", "did you mean 'fid'"]),
        (("run", *REAL, "--tensor", "beofre"), ["unknown tensor", "did you mean 'before'"]),
        (("run", *REAL, "--tensor", "risk"), ["risk", "holds no samples"]),
        (("run", *REAL, "--tensor", "x.renoise"), ["unknown tensor", "'x.renoise'"]),
        (("run", *REAL, "--features", "ownn"), ["unknown features 'ownn'", "did you mean 'own'"]),
        (("run", *REAL, "--features", "torchscript:none.pt"), ["cannot read none.pt"]),
        (("run", *REAL, "--split", "test"), ["unknown split 'test'"]),
        (("run", *REAL, "--count", 91), ["asked for 91 samples, but there are only 90"]),
        (("run", *REAL, "--count", 7), ["pr needs at least 8 samples, got 7"]),
        (("run", *REAL, "--size", 8), ["--size is for folders and zips"]),
        (("run", "--real", "digits8", "--features", "pixels"), ["different lengths", "1024 of run and 64 of digits8"]),
        (("run", "--real", "grid2", "--real-count", 20), ["expected images", "(1, 2)"]),
        (("hands32", *REAL, "--tensor", "x"), ["--tensor is for run folders"]),
        (("run", *REAL, "--captions", "c.txt"), ["--captions FILE and --clip DIR"]),
        (("run", *REAL, "--metric", "clip"), ["--captions FILE and --clip DIR"]),
        (("run", "--captions", "c.txt", "--clip", "nowhere/at/all"), ["c.txt"]),
        (("run", *REAL, "--write-stats", "s.npz"), [".safetensors file, got s.npz"]),
        (("--write-captions", "c.tsv"), ["--captions FILE"]),
        (("run", *REAL, "--device", "warp"), ["warp"]),
        (("--count", 9, "--real", "hands32", "--write-stats", "s.safetensors"), ["--count are for the samples"]),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_leaves_nothing(tmp_path, run, words, parts):
    assert refused(fanal("eval", *words), *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_captions_that_do_not_fit_are_refused(tmp_path, tiny):  # noqa: F811
    save(tmp_path / "p", color(3, 30))
    (tmp_path / "c.txt").write_text("a cat\na dog\n")
    told = fanal("eval", "p", "--captions", "c.txt", "--clip", tiny)
    assert refused(told, "holds 2 captions for 3 samples", "--caption-seed")
    told = fanal("eval", "p", "--captions", "c.txt", "--caption-seed", 0, "--clip", tiny)
    assert refused(told, "captions of 2 images")
    (tmp_path / "c3.txt").write_text("a cat\na dog\na mat\n")
    assert refused(fanal("eval", "p", "--captions", "c3.txt", "--clip", tmp_path / "p"), "no weights as safetensors")


def test_samples_that_are_not_finite_are_refused(tmp_path, hands):
    x = hands.clone()
    x[7, 0, 3, 3] = torch.nan
    write_tensors(tmp_path / "s.safetensors", {"x": x})
    told = fanal("eval", "s.safetensors", *REAL, "--real-count", 20)
    assert refused(told, "image 7", "NaN")
    assert fanal("eval", "s.safetensors", *REAL, "--real-count", 20, "--features", "pixels").exit_code == 2


def test_a_run_that_was_stopped_goes_on_though_it_writes_statistics(tmp_path, run, monkeypatch):
    words = ("eval", run, "--real", "hands32", "--real-count", 40, "--metric", "kid", "--write-stats", "s.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("fanal.runs.Run.describe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert fanal(*words, "--out", "e").exit_code == 130
    again = fanal(*words, "--out", "e")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "s.safetensors").is_file()
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == ["run.json", "stats.safetensors"]


def test_captions_that_are_there_are_kept(tmp_path):
    (tmp_path / "c.txt").write_text("a dog\n", encoding="utf-8")
    (tmp_path / "mine.tsv").write_text("mine\n", encoding="utf-8")
    words = ("eval", "--captions", "c.txt", "--count", 1, "--write-captions", "mine.tsv")
    assert refused(fanal(*words), "mine.tsv exists")
    assert (tmp_path / "mine.tsv").read_text(encoding="utf-8") == "mine\n"
    assert fanal(*words, "--overwrite").exit_code == 0
