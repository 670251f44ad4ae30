"""What a geometry run found: a few sentences, each from its figures, and its numbers in tables by subject."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fanal.metrics import Estimate
from fanal.report.geometry.likeness import KEYS, NULLS, cell, compared
from fanal.report.study import Table
from fanal.summary import estimated

__all__ = ["ALL", "SPREAD", "sentences", "tables"]

ALL = 0.99
"""Share of the variance off the chord that counts as all that bends."""

SPREAD = "Each ± is one standard error of a mean over trajectories; figures without one do not vary, or are of one."

_STRAIGHT, _BENT = 0.01, 0.1  # of the chord: how far from it the words say "nearly straight", and "clearly bent"
_ROUNDING = 1e-6
_WINDOW = 5  # of runs that do not say it

_SUBJECTS = {
    "path": (
        "length / (sigma_max sqrt d)",
        "length / chord",
        "largest deviation / chord",
        "steps nearer to the end",
        "least cosine",
    ),
    "predictions": (
        "predictions near the end from sigma",
        "states near the end from sigma",
        "prediction nearer to the end than the state",
        "predictions nearer to the end",
        "denoised largest deviation / chord",
    ),
    "z-space": ("z length / chord", "z largest deviation / chord", "z steps nearer to the end"),
    "stages": (
        "curved from sigma",
        "curved to sigma",
        "kept to sigma",
        "stage.entropy.first",
        "stage.entropy.last",
    ),
    "drawn trajectories": (
        "procrustes residual / size",
        "procrustes residual across / size across",
        "fit error / length",
        "rebuilt residual / size",
        "rebuilt residual / size across",
    ),
    "ends": (
        "end to nearest point / sqrt d",
        "exact end to nearest point / sqrt d",
        "ends apart / sqrt d",
        "both ends have one nearest point",
        "end to encoded image / sqrt d",
        "end to noised image / sqrt d",
    ),
}
_BY_DIMENSION = ("explained by ", "z explained by ", "mean error in ", "direct, top ")


def _sure(found: Estimate) -> float:
    """Two standard errors."""
    return 0.0 if math.isnan(found.se) else 2 * found.se


def _below(a: Estimate, b: Estimate) -> bool:
    """Whether a figure is smaller than another by more than two standard errors of their difference."""
    return b.value - a.value > math.hypot(_sure(a), _sure(b))


def _straightness(numbers: Mapping[str, Estimate]) -> Iterator[str]:
    off, length = numbers["largest deviation / chord"], numbers["length / chord"]
    if off.value <= _ROUNDING:
        yield "Trajectories are straight, up to rounding."
        return
    word = "slightly bent"
    if off.value < _STRAIGHT:
        word = "nearly straight"
    elif off.value >= _BENT:
        word = "clearly bent"
    longer = Estimate(length.value - 1, length.se, length.n)
    yield (
        f"Trajectories are {word}: at their farthest they are {off.rounded(100)} % of their chord from it, and "
        f"{longer.rounded(100)} % longer."
    )


def _dimensions(numbers: Mapping[str, Estimate], chance: Mapping[str, Any], d: int) -> Iterator[str]:
    shares = _series(numbers, "explained by ")
    enough = [k for k, share in enumerate(shares, 1) if share.value - _sure(share) >= ALL]
    k = enough[0] if enough else len(shares)
    beside = f"{k} component{'s' if k > 1 else ''} beside the chord"
    noise = chance.get(f"explained by {k}")
    than = f" (of noise paths: {estimated(noise).rounded(100)} %)" if noise else ""
    if enough and k + 1 >= d:
        yield f"All that bends lies in {k + 1} dimensions; samples have no more."
    elif enough:
        share = shares[k - 1].rounded(100)
        explain = "explain" if k > 1 else "explains"
        yield f"{k + 1} dimensions hold {100 * ALL:g} % of what bends: {beside} {explain} {share} %{than}."
    else:
        share = shares[k - 1].rounded(100)
        yield f"{100 * ALL:g} % of what bends takes more than {k + 1} dimensions: {beside} explain {share} %{than}."


def _arrival(numbers: Mapping[str, Estimate]) -> Iterator[str]:
    first, then = (numbers[f"{what} near the end from sigma"] for what in ("predictions", "states"))
    if not first.n:
        yield "Predictions do not come near the end above sigma 0."
        return
    when = f"Predictions come near the end from sigma {first.rounded()} on"
    if not then.n:
        yield f"{when}, states not above sigma 0."
    elif _below(then, first):
        yield f"{when}, before states do, from {then.rounded()}."
    else:
        yield f"{when}, no earlier than states, from {then.rounded()}."


def _stages(numbers: Mapping[str, Estimate], top: float, levels: int, window: int) -> Iterator[str]:
    if 2 * (2 * window + 1) > levels:
        yield (
            f"Where they bend is not told: with {levels} levels, each curvature is fitted to {2 * window + 1} of them, "
            "more than half. Give more --steps."
        )
        return
    begin, end, kept = (numbers[f"{what} sigma"] for what in ("curved from", "curved to", "kept to"))
    if not begin.n:
        yield "No stage is found in which trajectories bend."
        return
    way = f"They run straight, and bend from sigma {begin.rounded()} to {end.rounded()}"
    if begin.value + _sure(begin) >= top:
        way = f"They bend from the start to sigma {end.rounded()}"
    if end.value - _sure(end) > kept.value:
        yield f"{way}, then run straight again to {kept.rounded()}, below which curvature is not counted."
    else:
        yield f"{way}, as long as anything moves; no last straight stage is seen."


def _posterior(numbers: Mapping[str, Estimate]) -> Iterator[str]:
    first, last = (numbers.get(f"stage.entropy.{which}") for which in ("first", "last"))
    if first and last and first.n:
        yield (
            f"By the posterior over the data, the undecided stage begins at sigma {first.rounded()}; its last level is "
            f"{last.rounded()}, after which one point is left."
        )


def _likelihood(results: Mapping[str, Any]) -> Iterator[str]:
    if "likelihood" not in results:
        return
    state, ahead, met = (estimated(results["likelihood"][key]) for key in ("state", "prediction", "met"))
    if min(state.value, ahead.value) == 1:
        rises = "Likelihood rises at every step, to the next state and to the prediction"
    else:
        rises = f"Likelihood rises at {state.rounded(100)} % of the steps to the next state, and at "
        rises += f"{ahead.rounded(100)} % to the prediction"
    holds = "always holds" if met.value == 1 else f"holds at {met.rounded(100)} %"
    yield f"{rises}; the assumption that proves it, d1 <= d2, {holds}."


def _verdict(own: Estimate, chance: Mapping[str, Estimate]) -> str:
    more = [word for word, value in chance.items() if _below(own, value)]
    less = [word for word, value in chance.items() if _below(value, own)]
    rest = [word for word in chance if word not in (*more, *less)]
    if not more and not less:
        return "no more alike than by chance"
    parts = [f"more alike than {' and '.join(more)}"] if more else []
    parts += [f"less {'' if more else 'alike '}than {' and '.join(less)}"] if less else []
    return ", ".join([*parts, *([f"as much as {rest[0]}"] if rest else [])])


def _alike(found: Mapping[str, Any]) -> Iterator[str]:
    """Shapes of the first group beside chance, measure by measure."""
    verdicts: dict[str, list[str]] = {}
    for key in KEYS:
        own = cell(found, key, 0, 0)
        if math.isnan(own.value):
            return
        if math.isnan(own.se):
            yield "Shapes are not compared with chance: that takes three drawn trajectories at least."
            return
        chance = {word: estimated(found["nulls"][name][key]) for name, word in NULLS.items()}
        verdict = _verdict(own, chance)
        if key == KEYS[0]:
            values = ", ".join(f"{word} {value.rounded()}" for word, value in chance.items())
            yield f"Shapes are {verdict}: {key} {own.rounded()}; {values}."
        else:
            verdicts.setdefault(verdict, []).append(key)
    for verdict, keys in verdicts.items():
        yield f"Their {' and '.join(keys)} {'are' if len(keys) > 1 else 'is'} {verdict}."


def _classes(found: Mapping[str, Any], count: int) -> Iterator[str]:
    """How many of several groups are more alike than chance, by the best motion."""
    inner = [cell(found, KEYS[0], i, i) for i in range(count)]
    inner = [own for own in inner if not math.isnan(own.se)]
    chance = [estimated(found["nulls"][name][KEYS[0]]) for name in NULLS]
    alike = sum(all(_below(own, by_chance) for by_chance in chance) for own in inner)
    if inner:
        yield (
            f"By {KEYS[0]}, shapes are more alike than {' and '.join(NULLS.values())} in {alike} of {len(inner)} "
            "groups."
        )


def _rivals(found: Mapping[str, Any], own: int) -> Iterator[str]:
    """Whether other models' shapes are as near as the model's own are to each other."""
    inner = cell(found, KEYS[0], 0, 0)
    for j in range(own, len(found["names"])):
        between = cell(found, KEYS[0], 0, j)
        if math.isnan(inner.se) or math.isnan(between.value):
            continue
        farther = "farther" if _below(inner, between) else "no farther"
        yield (
            f"Shapes of {found['names'][j]} are {farther} from this model's than these are from each other: {KEYS[0]} "
            f"{between.rounded()}."
        )


def _flagged(results: Mapping[str, Any]) -> Iterator[str]:
    for level in results.get("flagged", ()):
        told = f"{level['deviation']:.3g} in place of {level['usual']:.3g}"
        yield f"Score deviation stands out at sigma {level['sigma']:.4g}: {told}."


def sentences(results: Mapping[str, Any]) -> list[str]:
    """Return what a run found, in words, each of which follows from its figures.

    A figure is called smaller than another, or above 99 %, where it is by more than two standard errors. How straight
    trajectories are is told by the mean of their largest distance from the chord: below 1 % of it "nearly straight",
    from 10 % on "clearly bent".

    Args:
        results: those of its `run.json`.
    """
    numbers, found = _numbers(results), results["regularity"]
    own, bends = len(set(results["groups"])), numbers["largest deviation / chord"].value > _ROUNDING
    lines = list(_straightness(numbers))
    if bends:
        lines += _dimensions(numbers, found["nulls"].get("forward", {}), int(results["d"]))
        levels = sum(sigma > 0 for sigma in results["sigmas"])
        lines += _stages(numbers, float(results["sigmas"][0]), levels, int(results.get("window", _WINDOW)))
    lines += [*_arrival(numbers), *_posterior(numbers), *_likelihood(results)]
    if bends:
        lines += _alike(found) if own == 1 else _classes(found, own)
        lines += _rivals(found, own) if own == 1 else ()
    return [*lines, *_flagged(results)]


def _numbers(results: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: estimated(found) for name, found in (results["numbers"] | results["shape"]).items()}


def _series(numbers: Mapping[str, Estimate], before: str, after: str = "") -> list[Estimate]:
    """Figures by name with a count in it, from 1 on."""
    out: list[Estimate] = []
    while f"{before}{len(out) + 1}{after}" in numbers:
        out.append(numbers[f"{before}{len(out) + 1}{after}"])
    return out


def _by_dimension(numbers: Mapping[str, Estimate]) -> Table:
    """One row per dimension, until nothing is left to explain."""
    left, direct = _series(numbers, "mean error in ", "-D"), _series(numbers, "direct, top ")
    shares, z = _series(numbers, "explained by "), _series(numbers, "z explained by ")
    columns: list[Sequence[Estimate | None]] = [[None, *shares], left, direct, [None, *z]]
    rows = []
    for k in range(len(left)):
        cells = [column[k] if k < len(column) else None for column in columns]
        rows.append([f"{k + 1}{' (the chord)' if not k else ''}", *("" if c is None else c.rounded() for c in cells)])
        if left[k].value <= _ROUNDING * left[0].value and (not k or k > len(z) or z[k - 1].value >= 1 - _ROUNDING):
            break
    head = ["dimensions", "variance explained", "mean distance left", "direct, top k", "z: variance explained"]
    return Table("dimensions", head, rows)


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Return a run's numbers by subject, each under the name that it has in `run.json`.

    Args:
        results: those of its `run.json`.
    """
    numbers = _numbers(results)
    named = {name for names in _SUBJECTS.values() for name in names}
    rest = tuple(name for name in numbers if name not in named and not name.startswith(_BY_DIMENSION))
    out = []
    for subject, names in (_SUBJECTS | {"more": rest}).items():
        rows = [[name, numbers[name].rounded()] for name in names if name in numbers]
        out += [Table(subject, [subject, "mean"], rows)] if rows else []
    out.insert(1, _by_dimension(numbers))
    return [*out, Table("regularity", ["regularity", *KEYS], compared(results["regularity"]))]
