"""The tables and plots of `fanal bench hallucination`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fanal.bench.hallucination import PLAIN
from fanal.bench.plots import Line, Panel
from fanal.bench.quality import short
from fanal.bench.schedule_tables import markdown

__all__ = ["panels", "tables"]

_QUARTERS = 4
_HEAD = """# Hallucinations: all tables

Written by `fanal bench hallucination`. Figures are ± one standard error; what they mean is in
[The benchmark](hallucination.md) and [How to submit a method](protocol.md).
"""
_STEPS = 7  # columns of the tables along the run
_MARK = {"worse": " ↓", "kept": "", "open": " ?"}


def _percent(figure: Mapping[str, Any] | None, sign: bool = False) -> str:
    """A share in percent, with its standard error."""
    if figure is None or figure["value"] is None:
        return "–"
    value, se = 100 * figure["value"], figure["se"]
    digits = 2 if se is not None and 100 * se < 0.1 else 1
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text if se is None else f"{text} ± {100 * se:.{digits}f}"


def _number(figure: Mapping[str, Any], digits: int = 1) -> str:
    value, se = figure["value"], figure["se"]
    rough = se is not None and se >= 0.5 * 10.0**-digits
    text = f"{value:.{digits}f}".rstrip("0").rstrip(".") if not rough else f"{value:.{digits}f}"
    return f"{text} ± {se:.{digits}f}" if rough else text


def _corrections(own: Mapping[str, Any]) -> str:
    rows = []
    for row in own["methods"]:
        judged = [_percent(row["difference"], sign=True), _percent(row["corrected"]), _percent(row["new"])]
        worse = [name for name, found in row["diversity"].items() if found["judged"] == "worse"]
        rows.append(
            [
                row["name"],
                str(row["n"]),
                _percent(row["wrong"]),
                *(["–"] * len(judged) if row["name"] == PLAIN else judged),
                _number(row["calls"]) + (" (over)" if row["over_budget"] else ""),
                _number(row["products"]),
                _number(row["time"], 2),
                ", ".join(worse) or "–",
            ]
        )
    head = ["method", "N", "wrong, %", "change", "corrected, %", "newly wrong, %"]
    return markdown([*head, "calls", "products", "time / Euler", "worse"], rows)


def _classes(own: Mapping[str, Any]) -> str:
    """Share of each kind of error after each method, beside that of the plain run on the same samples."""
    kinds = [kind for kind in own["verdicts"][1:] if any(kind in row["by_class"] for row in own["methods"])]
    rows = []
    for row in own["methods"]:
        cells = [row["by_class"].get(kind) for kind in kinds]
        if row["name"] == PLAIN:
            rows.append([row["name"], *("–" if c is None else _percent(c["after"]) for c in cells)])
        else:
            rows.append([row["name"], *("–" if c is None else f"{_percent(c['after'])} ({_signed(c)})" for c in cells)])
    return markdown(["method", *kinds], rows)


def _signed(change: Mapping[str, Any]) -> str:
    return f"{100 * change['difference']['value']:+.1f}"


def _diversity(own: Mapping[str, Any]) -> str:
    rows = []
    names = list(own["methods"][0]["diversity"])
    for row in own["methods"]:
        cells = []
        for name in names:
            found = row["diversity"].get(name)
            if found is None:
                cells.append("–")
            elif row["name"] == PLAIN or found["ratio"] is None or found["ratio_se"] is None:
                cells.append(short(found))
            else:
                ratio = f"{found['ratio']:.2f} ± {found['ratio_se']:.2f}"
                cells.append(f"{short({'value': found['value'], 'se': None})} (× {ratio}{_MARK[found['judged']]})")
        rows.append([row["name"], *cells])
    head = [f"{name} {'↓' if own['methods'][0]['diversity'][name]['better'] < 0 else '↑'}" for name in names]
    return markdown(["method", *head], rows)


def _detection(own: Mapping[str, Any]) -> str:
    rows = []
    for name, found in own["detectors"].items():
        cost = "0" if found["free"] else f"{found['evaluations']:.3g} + {found['products']:.3g}"
        area, rate = found.get("auc"), found.get("tpr_at_20")
        rows.append([name, str(found["n"]), short(area), "–" if rate is None else _percent(rate), cost])
    rows.sort(key=lambda row: -_leading(row[2]))
    return markdown(["detector", "N", "AUC", "TPR at 20 % FPR", "calls + products"], rows)


def _leading(text: str) -> float:
    try:
        return float(text.split()[0])
    except ValueError:
        return -1.0


def _by_class(own: Mapping[str, Any]) -> str:
    kinds = [k for k in own["verdicts"][1:] if any(k in d.get("by_class", {}) for d in own["detectors"].values())]
    rows = [
        [name, *(short(found.get("by_class", {}).get(kind)) for kind in kinds)]
        for name, found in own["detectors"].items()
    ]
    return markdown(["detector", *kinds], rows)


def _columns(sigma: Sequence[float], count: int = _STEPS) -> list[int]:
    """Indices of the steps that a table shows: spread over the part of the run where things happen."""
    inside = [i for i, s in enumerate(sigma) if 0.004 <= s <= 15]
    if len(inside) <= count:
        return inside
    return [inside[round(k * (len(inside) - 1) / (count - 1))] for k in range(count)]


def _along(own: Mapping[str, Any]) -> str:
    found = {name: d["by_step"] for name, d in own["detectors"].items() if "by_step" in d}
    first = next(iter(found.values()))
    columns = _columns(first["sigma"])
    rows = []
    for name, d in found.items():
        cells = ["–" if d["auc"][i] is None else f"{d['auc'][i]:.2f}" for i in columns]
        rows.append([name, *cells])
    return markdown(["AUC once the run has reached sigma", *(f"{first['sigma'][i]:.2g}" for i in columns)], rows)


def _peaks(own: Mapping[str, Any]) -> str:
    """In which part of the run a costly detector last rose: for a largest value, where that was."""
    rows = []
    steps = len(own["sigmas"]) - 1
    parts = [range(k * steps // _QUARTERS, (k + 1) * steps // _QUARTERS) for k in range(_QUARTERS)]
    for name, found in own["detectors"].items():
        if "over=max" in name:
            rows.append([name, *(f"{100 * sum(found['raised'][i] for i in part):.0f}" for part in parts)])
    return markdown(["largest at steps", *(f"{part.start}–{part.stop - 1}" for part in parts)], rows)


def _confusions(own: Mapping[str, Any]) -> str:
    rows = []
    for name, found in own["detectors"].items():
        c = found["confusion"]
        counts = [str(c[key]) for key in ("tp", "fn", "fp", "tn")]
        rows.append([name, f"{c['threshold']:.3g}", *counts, _percent(c["tpr"]), _percent(c["fpr"])])
    head = ["detector", "threshold", "wrong, flagged", "wrong, missed", "right, flagged", "right, left"]
    return markdown([*head, "TPR, %", "FPR, %"], rows)


def _sweep(own: Mapping[str, Any]) -> str:
    """The threshold sweep of the gate."""
    rows = []
    for c in own["detectors"][own["gate"]["detector"]].get("sweep", [])[::2]:
        rows.append([f"{c['threshold']:.3g}", *(_percent(c[key]) for key in ("flagged", "tpr", "fpr", "precision"))])
    return markdown(["threshold", "flagged, %", "TPR, %", "FPR, %", "precision, %"], rows)


def _decision(own: Mapping[str, Any]) -> str:
    d = own["decision"]
    columns = _columns(d["sigma"], 8)
    rows = [[key, *(_percent(d[key][i]) for i in columns)] for key in ("same", "settled")]
    return markdown(["sigma", *(f"{d['sigma'][i]:.2g}" for i in columns)], rows)


def _mechanism(own: Mapping[str, Any]) -> str:
    m = own["mechanism"]
    cosines = ["cosine", *(f"{c['value']:.3f} ± {c['se']:.3f}" for c in m["cosine"])]
    norms = ["norm", *(f"{r:.3f} ({s:.3f})" for r, s in zip(m["ratio"], m["spread"], strict=True))]
    return markdown(["sigma", *(f"{s:.2g}" for s in m["sigma"])], [cosines, norms])


def _claims(results: Mapping[str, Any]) -> str:
    """What the claims of [RODS] come to, one column per model."""
    rows = [[title, *(make(own) for own in results.values())] for title, make in _CLAIMS.items()]
    return markdown(["", *results], rows)


def _stands(own: Mapping[str, Any], share: str) -> str:
    """Noise level from which a share of the verdicts stands, and how much of the run is done by then."""
    sigma, sigmas = own["decision"][share], own["sigmas"]
    if sigma is None:
        return "–"
    return f"{sigma:.2g} ({100 * sum(s > sigma for s in sigmas) / (len(sigmas) - 1):.0f} %)"


def _area(own: Mapping[str, Any], name: str) -> str:
    return short(own["detectors"].get(name, {}).get("auc"))


def _best(own: Mapping[str, Any]) -> str:
    """The best detector that costs nothing."""
    free = {name: d["auc"] for name, d in own["detectors"].items() if d["free"] and d.get("auc")}
    name = max(free, key=lambda name: free[name]["value"], default="")
    return f"{short(free[name])} ({name})" if name else "–"


def _late(own: Mapping[str, Any]) -> str:
    """Share of samples whose index, as printed, is largest in the last quarter of the steps."""
    raised = own["detectors"].get(_PRINTED, {}).get("raised")
    return "–" if raised is None else f"{100 * sum(raised[-(len(raised) // _QUARTERS) :]):.0f} %"


def _method(key: str, name: str) -> Callable[[Mapping[str, Any]], str]:
    def tell(own: Mapping[str, Any]) -> str:
        row = next((row for row in own["methods"] if row["name"] == name), None)
        if row is None:
            return "–"
        told = _number(row[key], 2) if key == "time" else _percent(row[key])
        return told if key == "time" or told == "–" else f"{told} %"

    return tell


def _lost(name: str) -> Callable[[Mapping[str, Any]], str]:
    def tell(own: Mapping[str, Any]) -> str:
        found = next((row["diversity"] for row in own["methods"] if row["name"] == name), {})
        return ", ".join(figure for figure, own in found.items() if own["judged"] == "worse") or "–"

    return tell


_PRINTED = "rods_index:v=score,over=max,window=0..80"
_CLAIMS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "half of the verdicts stand from sigma (of the run)": lambda own: _stands(own, "half"),
    "nine tenths stand from sigma (of the run)": lambda own: _stands(own, "nine tenths"),
    "index as printed is largest in the last quarter": _late,
    "AUC of the index, as printed": lambda own: _area(own, _PRINTED),
    "AUC of the index in the paper's window": lambda own: _area(own, "rods_index:v=score,over=max,window=2..46"),
    "AUC of the index of the residual, mean, tuned window": lambda own: _area(own, "rods_index"),
    "AUC of the best free detector": _best,
    "corrected by CAS": _method("corrected", "cas"),
    "corrected by temperature": _method("corrected", "temperature"),
    "corrected by a random direction": _method("corrected", "random"),
    "corrected by Heun": _method("corrected", "heun"),
    "corrected by renoise": _method("corrected", "renoise"),
    "corrected by the ladder": _method("corrected", "ladder"),
    "newly wrong by CAS": _method("new", "cas"),
    "newly wrong by temperature": _method("new", "temperature"),
    "newly wrong by the ladder": _method("new", "ladder"),
    "time of CAS over Euler's": _method("time", "cas"),
    "time of renoise over Euler's": _method("time", "renoise"),
    "time of the ladder over Euler's": _method("time", "ladder"),
    "diversity that CAS loses": _lost("cas"),
    "diversity that temperature loses": _lost("temperature"),
    "diversity that renoise loses": _lost("renoise"),
    "diversity that the ladder loses": _lost("ladder"),
}

_PARTS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "corrections": (
        "Every method on the same noise. Repairs are gated by {gate}. *Worse*: figures of diversity that lose more "
        "than 5 % against Euler, beyond two standard errors.",
        _corrections,
    ),
    "kinds of error": ("Share of all samples, in %; in brackets the paired change.", _classes),
    "diversity": ("In brackets the paired ratio to Euler: ↓ worse by more than 5 %, ? open, else kept.", _diversity),
    "detectors": (
        "They look where they told most on tuning seeds; with *mid* where samples are decided.",
        _detection,
    ),
    "detectors by kind of error": ("AUC against right samples.", _by_class),
    "how early": ("AUC of what was known when the run had come down to a noise level.", _along),
    "where the index peaks": ("Share of samples, in %.", _peaks),
    "confusion": (
        "At the threshold that as many calibration samples exceed as the gate flags; where a detector costs calls, as "
        "many of the samples themselves.",
        _confusions,
    ),
    "threshold sweep": ("Of the gate, {gate} at its own threshold.", _sweep),
    "mechanism": (
        "Cosine of the directions of CAS and SAS along the plain run; ‖x − D‖/(sigma·√d), in brackets its spread over "
        "samples.",
        _mechanism,
    ),
    "decision": ("Share of predictions D(x, sigma), in %, that have the final verdict, and keep it.", _decision),
}


def tables(results: Mapping[str, Any]) -> str:
    """Return every model's figures as a page of Markdown."""
    out = [_HEAD, f"## Claims\n\nWhat [What holds](what-holds.md) reads.\n\n{_claims(results)}"]
    for spec, own in results.items():
        out.append(f"## {spec}\n")
        for title, (about, make) in _PARTS.items():
            if len(own["verdicts"]) == 2 and "kind" in title:
                continue  # one kind of error: nothing to tell apart
            if "peak" in title and not any("over=max" in name for name in own["detectors"]):
                continue
            gate = f"{own['gate']['detector']}, which flags {100 * own['gate']['flag']:.0f} %"
            out.append(f"### {spec}: {title}\n\n{about.format(gate=gate)}\n\n{make(own)}")
    return "\n".join(out)


def panels(results: Mapping[str, Any]) -> list[Panel]:
    """Return the plots: ROC, AUC along the run, threshold sweep, and wrong samples against calls."""
    out = []
    for spec, own in results.items():
        detectors = own["detectors"]
        curves = [
            Line(name, d["roc"]["fpr"], d["roc"]["tpr"], [None] * len(d["roc"]["fpr"]))
            for name, d in detectors.items()
            if "roc" in d
        ]
        out.append(Panel(f"{spec}: ROC", curves, "right samples flagged", "wrong samples flagged", log=False))
        lines = [_rising(name, d["by_step"]) for name, d in detectors.items() if "by_step" in d]
        out.append(Panel(f"{spec}: AUC along the run", lines, "step", "AUC", log=False))
        rows = detectors[own["gate"]["detector"]].get("sweep", [])
        shares = [c["flagged"]["value"] for c in rows]
        swept = [
            Line(key, shares, [c[key]["value"] for c in rows], [c[key]["se"] for c in rows])
            for key in ("tpr", "fpr", "precision")
        ]
        out.append(Panel(f"{spec}: threshold sweep of {own['gate']['detector']}", swept, "flagged", "share", log=False))
        points = [
            Line(
                row["name"],
                [row["calls"]["value"] + row["products"]["value"]],
                [row["wrong"]["value"]],
                [row["wrong"]["se"]],
            )
            for row in own["methods"]
        ]
        out.append(Panel(f"{spec}: wrong samples", points, "calls + products", "wrong", log=False))
    return out


def _rising(name: str, by_step: Mapping[str, Any]) -> Line:
    kept = [i for i, value in enumerate(by_step["auc"]) if value is not None]
    return Line(name, kept, [by_step["auc"][i] for i in kept], [by_step["se"][i] for i in kept])
