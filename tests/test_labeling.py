"""Labels of a person: what a click leaves behind, what the page shows, and what nobody else can do to it."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from filelock import FileLock

import labeled
from fanal import labeling, metrics
from fanal.errors import FanalError
from fanal.files import read_json
from fanal.hallucination.thresholds import threshold_for
from fanal.labeling import Taxonomy, export_csv, open_labels, read_samples, summarize
from labeled import COUNT, read_labels, samples_verdicts
from toys import fanal, samples

# Fixtures
hands = labeled.hands
run = labeled.run


# Taxonomies


def test_hands_have_the_seven_classes_of_the_paper_and_faces_two():
    assert len(labeling.taxonomy("hands").classes) == 7
    assert labeling.taxonomy("faces").classes == ("right", "wrong")
    assert labeling.taxonomy("shapes32").classes == ("right", "duplicate", "malformed", "wrong column", "empty")


def test_a_file_names_one_class_per_line(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("# what to look for\nright\n\n  two heads \nno héad\n", encoding="utf-8")
    assert labeling.taxonomy(str(path)).classes == ("right", "two heads", "no héad")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "0"),
        (b"right\n", "has 1"),
        ("\n".join(map(str, range(19))).encode(), "has 19"),
        (b"right\nwrong\nwrong\n", "must differ"),
        (b"right\nunsure\n", "unsure"),
        (b"right\n" + 61 * b"x", "1 to 60"),
        (b"right\nbad\x07bell\n", "printable"),
        (b"right\n\xff\xfe\n", "cannot read"),
        (b"#" * 70_000, "larger than"),
    ],
)
def test_unusable_classes_are_refused(tmp_path, content, word):
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    with pytest.raises(FanalError, match=word):
        labeling.taxonomy(str(path))


def test_an_unknown_taxonomy_names_the_known_ones():
    with pytest.raises(FanalError, match="did you mean 'hands'.*text file"):
        labeling.taxonomy("hnads")


# The file


def test_each_label_is_on_the_disk_at_once(run):
    labels = open_labels(read_samples(run))
    for sample, code in ((3, 0), (5, 2), (0, None)):
        labels.set(sample, code)
        assert read_json(run / "labels.json")["labels"] == {str(s): c for s, c in labels.codes.items()}
    assert list(labels.codes) == [3, 5, 0]
    assert read_labels(run / "labels.json") == {3: 0, 5: 2}
    assert [path.name for path in run.iterdir() if "part" in path.name] == []


def test_undo_goes_back_one_change_at_a_time_even_after_a_break(run):
    labels = open_labels(read_samples(run))
    labels.set(3, 0)
    labels.set(5, 2)
    labels.set(3, 1)  # another opinion
    assert labels.undo() == 3
    assert labels.codes == {3: 0, 5: 2}
    labels.set(7, None)
    again = open_labels(read_samples(run))
    assert again.codes == {5: 2, 3: 0, 7: None}
    assert [again.undo(), again.undo()] == [7, 3]
    assert read_json(run / "labels.json")["labels"] == {"5": 2}
    assert [again.undo(), again.undo()] == [5, None]


def test_the_order_is_shuffled_by_the_seed_alone(run):
    found = read_samples(run)
    orders = [open_labels(found, seed=seed).order for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == list(range(COUNT)) != orders[2]
    open_labels(found, seed=1).set(0, 0)
    assert open_labels(read_samples(run)).order == orders[2]  # the file remembers


def test_a_full_disk_changes_nothing(run, monkeypatch):
    labels = open_labels(read_samples(run))
    labels.set(3, 0)

    def full(path, value):
        raise FanalError("cannot write: no space left on device")

    monkeypatch.setattr("fanal.labeling.labels.write_json", full)
    for change in (lambda: labels.set(4, 1), lambda: labels.set(3, 1), labels.undo):
        with pytest.raises(FanalError, match="no space"):
            change()
    assert labels.codes == {3: 0}
    monkeypatch.undo()
    assert labels.undo() == 3


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("format", "fanal-labels-9", "no label file"),
        ("samples", "0" * 64, "other samples"),
        ("count", COUNT + 1, "other samples"),
        ("classes", ["right"], "has 1"),
        ("classes", [1, 2], "printable"),
        ("classes", 7, "damaged"),
        ("labels", [0], "damaged"),
        ("labels", {"x": 0}, "damaged"),
        ("labels", {str(COUNT): 0}, "damaged"),
        ("labels", {"0": 6}, "damaged"),
        ("labels", {"0": True}, "damaged"),
        ("labels", {"0": "right"}, "damaged"),
        ("seed", "1", "damaged"),
    ],
)
def test_damaged_and_foreign_files_are_refused(run, key, value, word):
    open_labels(read_samples(run)).set(0, 0)
    path = run / "labels.json"
    path.write_text(json.dumps(read_json(path) | {key: value}))
    with pytest.raises(FanalError, match=word):
        open_labels(read_samples(run))


def test_a_file_keeps_its_classes(run):
    assert open_labels(read_samples(run)).taxonomy.classes[1:] == samples_verdicts(run)[1:]
    open_labels(read_samples(run), "faces").set(0, 1)
    assert open_labels(read_samples(run)).taxonomy.classes == ("right", "wrong")
    with pytest.raises(FanalError, match="begun with the classes right, wrong"):
        open_labels(read_samples(run), "hands")


def test_what_is_labeled_is_what_the_detector_watched(run):
    found, tensors = read_samples(run), samples(run)
    assert found.tensor == "before"
    assert torch.equal(found.x, tensors["before"])
    assert torch.equal(found.risk, tensors["risk"])
    assert torch.equal(found.verdict, tensors["verdict"])
    mended = read_samples(run, "x")
    assert mended.file.name == "labels.x.json"
    assert torch.equal(mended.x, tensors["x"])
    assert torch.equal(mended.verdict, tensors["verdict.redo"])
    assert torch.equal(mended.risk, tensors["risk.redo"])
    with pytest.raises(FanalError, match="known: before, x"):
        read_samples(run, "per_step")
    with pytest.raises(FanalError, match="not a run folder"):
        read_samples(run.parent)


# What labels say


def test_the_summary_counts_what_was_said(run):
    found = read_samples(run)
    labels = open_labels(found)
    truth = found.verdict.tolist()
    for sample, code in enumerate(truth):
        labels.set(sample, code)
    wrong = [sample for sample, code in enumerate(truth) if code]
    right = [sample for sample, code in enumerate(truth) if not code]
    labels.set(wrong[0], 0)  # one that the verifier alone rejects
    labels.set(right[0], 1)  # and one the other way around
    labels.set(right[1], None)
    told = summarize(found, labels)
    mine = torch.tensor([labels.codes[s] or 0 for s in range(COUNT) if s != right[1]])
    rows = torch.tensor([s for s in range(COUNT) if s != right[1]])
    assert (told.count, told.unsure, told.wrong.n) == (COUNT, 1, COUNT - 1)
    assert told.wrong.value == pytest.approx(float((mine != 0).double().mean()))
    assert told.wrong.low < told.wrong.value < told.wrong.high
    assert sum(share.value for share in told.classes.values()) == pytest.approx(1)
    assert told.verifier.table == (len(right) - 2, 1, 1, len(wrong) - 1)
    assert told.verifier.same.value == pytest.approx(1 - 2 / (COUNT - 1))
    assert told.verifier.same_class.value == pytest.approx(1 - 2 / (COUNT - 1))
    both, n = np.array([[len(right) - 2, 1], [1, len(wrong) - 1]]), COUNT - 1
    chance = (both.sum(0) * both.sum(1)).sum() / n**2
    assert told.verifier.kappa == pytest.approx((np.trace(both) / n - chance) / (1 - chance))
    assert told.auc == metrics.auc(found.risk[rows], mine != 0)
    assert told.threshold is None
    wanted = threshold_for(found.risk[rows], mine, tpr=0.5)
    assert summarize(found, labels, tpr=0.5).threshold == wanted


def test_a_summary_of_one_kind_has_no_curve(run):
    found = read_samples(run)
    labels = open_labels(found, "faces")
    assert summarize(found, labels).wrong is None
    labels.set(0, 1)
    told = summarize(found, labels)
    assert (told.auc, told.caught) == (None, None)
    assert told.verifier.same_class is None  # other classes than the verifier's
    with pytest.raises(FanalError, match="none of 1 is labelled right"):
        summarize(found, labels, fpr=0.1)
    with pytest.raises(FanalError, match="one rate"):
        summarize(found, labels, fpr=0.1, tpr=0.5)


def test_a_table_for_other_programs(run, tmp_path):
    found = read_samples(run)
    labels = open_labels(found)
    for sample, code in ((9, 4), (2, None), (5, 0)):
        labels.set(sample, code)
    export_csv(tmp_path / "labels.csv", found, labels)
    rows = list(csv.DictReader((tmp_path / "labels.csv").open()))
    assert [row["sample"] for row in rows] == ["2", "5", "9"]
    assert [row["label"] for row in rows] == ["unsure", "right", "missing finger"]
    assert [row["wrong"] for row in rows] == ["", "0", "1"]
    assert [int(row["seed"]) - int(row["sample"]) for row in rows] == [found.first_seed] * 3
    assert [float(row["risk"]) for row in rows] == [float(found.risk[s]) for s in (2, 5, 9)]
    assert [row["verdict"] for row in rows] == [found.verdicts[int(found.verdict[s])] for s in (2, 5, 9)]


def test_the_command_sums_up_and_exports(run, tmp_path):
    found = read_samples(run)
    labels = open_labels(found)
    for sample, code in enumerate(found.verdict.tolist()):
        labels.set(sample, code)
    told = fanal("label", run, "--summary", "--catch", 0.9, "--export", tmp_path / "l.csv")
    assert told.exit_code == 0
    assert "16 of 16 samples have a class; unsure, and in no rate: 0." in told.output
    assert "kappa 1.00" in told.output
    assert "AUC of the risk" in told.output
    assert f"Threshold {threshold_for(found.risk, found.verdict, tpr=0.9).value:.6g}" in told.output
    assert len((tmp_path / "l.csv").read_text().splitlines()) == COUNT + 1


def test_the_command_says_what_is_wrong(run, tmp_path):
    for words, word in (
        (("--summary",), "holds no label yet"),
        (("--catch", 0.9), "give --summary too"),
        (("--taxonomy", "nonesuch"), "unknown taxonomy"),
        (("--tensor", "y"), "unknown samples"),
        (("--export", tmp_path / "l.csv"), "holds no label yet"),
    ):
        told = fanal("label", run, *words)
        assert told.exit_code == 2
        assert word in told.output
    with FileLock(run / ".labels.json.lock"):
        told = fanal("label", run)
        assert told.exit_code == 2
        assert "another fanal label" in told.output


def test_at_most_eighteen_classes_have_a_key():
    assert len(labeling.labels.KEYS) == len(set(labeling.labels.KEYS)) == 18
    assert not set("u0 ") & set(labeling.labels.KEYS)
    Taxonomy("many", tuple(f"class {k}" for k in range(18)))
