"""What a person's labels say: rates, agreement with the verifier and with the risk, and a threshold."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fanal.errors import FanalError
from fanal.files import write_atomically
from fanal.hallucination import calibration, evaluate
from fanal.hallucination.thresholds import Interval, Threshold, interval, threshold_for
from fanal.labeling.labels import Labels, Samples
from fanal.metrics import Estimate

__all__ = ["Agreement", "Summary", "export_csv", "summarize"]

_FPR = 0.2  # where the true-positive rate is read, as in [RODS] fig. 6


@dataclass(frozen=True)
class Agreement:
    """A person against the verifier, over the samples that both judged.

    Attributes:
        same: share of samples that both call right or both call wrong.
        same_class: share with the same class; None where the two have other classes.
        kappa: Cohen's κ of right and wrong: 1 is full agreement, 0 what chance gives; NaN where one of them says the
            same of all.
        table: samples by (person, verifier): right and right, right and wrong, wrong and right, wrong and wrong.
    """

    same: Interval
    same_class: Interval | None
    kappa: float
    table: tuple[int, int, int, int]


@dataclass(frozen=True)
class Summary:
    """What a person's labels say.

    Attributes:
        count: samples of the run.
        unsure: labels that say "unsure"; they count in no rate.
        classes: share of each class among the labeled samples, with its 95 % interval; None before the first label.
        wrong: share of the labeled samples that are not right.
        verifier: agreement with the verifier, where there is one.
        auc: area under the ROC curve of the risk against the labels; None without risk or one of the two kinds.
        caught: true-positive rate at a false-positive rate of 20 %.
        threshold: for the wanted rate, where one was asked for.
    """

    count: int
    unsure: int
    classes: dict[str, Interval | None]
    wrong: Interval | None
    verifier: Agreement | None
    auc: Estimate | None
    caught: Estimate | None
    threshold: Threshold | None


def _rows(labels: Labels) -> tuple[Tensor, Tensor]:
    """Which samples have a class, and which."""
    return calibration.labelled(labels.codes, labels.count)


def _agreement(codes: Tensor, verdict: Tensor, same_classes: bool) -> Agreement:
    from sklearn.metrics import cohen_kappa_score

    mine, theirs = codes != 0, verdict != 0
    same, both = interval(mine == theirs), interval(codes == verdict) if same_classes else None
    assert same is not None
    varied = all(bool(side.any()) and not bool(side.all()) for side in (mine, theirs))
    kappa = float(cohen_kappa_score(mine.numpy(), theirs.numpy())) if varied else math.nan
    pairs = [(mine == a) & (theirs == b) for a in (False, True) for b in (False, True)]
    right, alarm, missed, wrong = (int(pair.sum()) for pair in pairs)
    return Agreement(same, both, kappa, (right, alarm, missed, wrong))


def summarize(
    samples: Samples,
    labels: Labels,
    *,
    tpr: float | None = None,
    fpr: float | None = None,
    flag: float | None = None,
) -> Summary:
    """Sum up a person's labels of a run.

    The labeled samples stand for all when they were labeled in the order that the page shows them: it is random.

    Args:
        samples: what was labeled.
        labels: the labels.
        tpr: set a threshold that catches at least this share of the wrong samples.
        fpr: set a threshold that flags at most this share of the right samples.
        flag: set a threshold that flags this share of all samples.

    Raises:
        FanalError: more than one rate is wanted, or one without risks or the labels that it needs.
    """
    rows, codes = _rows(labels)
    risk = None if samples.risk is None else samples.risk[rows]
    asked = [value for value in (tpr, fpr, flag) if value is not None]
    if asked and risk is None:
        raise FanalError(f"{samples.folder} holds no risk of {samples.tensor}, so that there is no threshold to set")
    found, names = codes != 0, labels.taxonomy.classes
    judged = None if samples.verdict is None or not len(rows) else samples.verdict[rows]
    rated = risk if bool(found.any()) and not bool(found.all()) else None
    return Summary(
        count=labels.count,
        unsure=len(labels.codes) - len(rows),
        classes={name: interval(codes == k) for k, name in enumerate(names)},
        wrong=interval(found),
        verifier=None if judged is None else _agreement(codes, judged, names[1:] == samples.verdicts[1:]),
        auc=None if rated is None else evaluate.roc(rated, found).auc,
        caught=None if rated is None else evaluate.tpr_at(rated, found, _FPR),
        threshold=threshold_for(risk, found, tpr=tpr, fpr=fpr, flag=flag) if asked and risk is not None else None,
    )


def export_csv(path: str | Path, samples: Samples, labels: Labels) -> None:
    """Write one line per labeled sample: its number, seed, label, whether that is wrong, risk and verdict.

    Raises:
        FanalError: the file cannot be written.
    """

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8", newline="") as file:
            out = csv.writer(file)
            out.writerow(["sample", "seed", "label", "wrong", "risk", "verdict"])
            for sample, code in sorted(labels.codes.items()):
                verdict = "" if samples.verdict is None else samples.verdicts[int(samples.verdict[sample])]
                seed = "" if samples.first_seed is None else samples.first_seed + sample
                label = "unsure" if code is None else labels.taxonomy.classes[code]
                risk = "" if samples.risk is None else repr(float(samples.risk[sample]))
                out.writerow([sample, seed, label, "" if code is None else int(code != 0), risk, verdict])

    write_atomically(Path(path), write)
