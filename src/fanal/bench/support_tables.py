"""Tables and plots of `fanal bench support`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fanal.bench.plots import Line, Panel
from fanal.bench.schedule_tables import markdown
from fanal.metrics import Estimate
from fanal.summary import estimated

__all__ = ["panels", "tables"]

_LEAST = 1e-9
_KEYS = ("target", "form", "process", "score")
_SHORT = {"delta": "δ", "scale": "w"}
_GROWS = {"delta": ("scale", "delta"), "scale": ("delta", "scale"), "step": ("scale", "delta")}  # rows and columns


def _short(value: float) -> str:
    return f"{value:.2g}"


def _percent(row: Mapping[str, Any]) -> str:
    return estimated(row).percent()


def _distances(cell: Mapping[str, Any]) -> str:
    return f"{_short(cell['whole']['q99'])} / {_short(cell['whole']['worst'])}"


def _off(cell: Mapping[str, Any]) -> str:
    return " / ".join(f"{100 * cell[name]['off']['value']:.0f}" for name in ("whole", "part")) + " %"


def _cells(own: Sequence[Mapping[str, Any]], write: Callable[[Mapping[str, Any]], str]) -> str:
    """One line per target, form, process and score; columns are scale and steps."""
    columns = sorted({(cell["scale"], cell["steps"]) for cell in own})
    groups: dict[tuple[str, ...], dict[tuple[float, int], Mapping[str, Any]]] = {}
    for cell in own:
        groups.setdefault(tuple(cell[key] for key in _KEYS), {})[cell["scale"], cell["steps"]] = cell
    varied = [k for k in range(len(_KEYS)) if len({names[k] for names in groups}) > 1] or [2]
    rows = [
        [*(names[k] for k in varied), *("–" if at not in by_column else write(by_column[at]) for at in columns)]
        for names, by_column in groups.items()
    ]
    return markdown([*(_KEYS[k] for k in varied), *(f"w {scale:g}, {steps}" for scale, steps in columns)], rows)


def _failures(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            ", ".join(row["broken"]) or "none",
            str(row["cells"]),
            str(row["failing"]),
            _short(row["worst"]),
            "{target}, {process}, {score}, w {scale:g}, {steps} steps".format(**row["where"]),
        ]
        for row in rows
    ]
    return markdown(["assumptions broken", "cells", "failing", "worst distance", "where"], lines)


def _exponents(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One table each: in δ by w, in w by δ, and in the step by both; all at the most steps."""
    return "\n".join(_grown(found[name], name) for name in _GROWS if found[name])


def _grown(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    down, across = _GROWS[name]
    most = max(row["steps"] for row in rows)
    own = {(row[down], row[across]): row for row in rows if row["steps"] == most}
    to = {at: "" if name == "step" else f" to {row['to']:g}" for (_, at), row in own.items()}
    lines = []
    for value in sorted({place[0] for place in own}):
        found = [own.get((value, at), {}).get("value") for at in sorted(to)]
        lines.append([f"{value:g}", *("–" if each is None else f"{each:.2f}" for each in found)])
    steps = f", from {most} to {max(row['to'] for row in own.values())} steps" if name == "step" else f", {most} steps"
    head = [f"in {_SHORT.get(name, name)}{steps}: {_SHORT[down]}"]
    return markdown([*head, *(f"{_SHORT[across]} {at:g}{to[at]}" for at in sorted(to))], lines)


def _needed(rows: Sequence[Mapping[str, Any]]) -> str:
    steps = sorted({int(count) for row in rows for count in row["off"]})
    lines = []
    for row in rows:
        off = {int(count): value["value"] for count, value in row["off"].items()}
        shares = [f"{100 * off[count]:.0f} %" for count in steps]
        lines.append([row["target"], row["process"], f"{row['scale']:g}", str(row["from"] or "–"), *shares])
    return markdown(["target", "process", "w", "on the support from", *(f"off, {count}" for count in steps)], lines)


def _noise(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            row["target"],
            str(row["steps"]),
            str(row["random"]["off"]["n"]),
            _percent(row["random"]["off"]),
            _short(row["random"]["worst"]),
            _short(row["on the line"]) if "on the line" in row else "–",
            _short(row["bad up to"]) if "bad up to" in row else "–",
        ]
        for row in rows
    ]
    head = ["target", "steps", "noises", "off", "worst", "from the line of symmetry", "off up to this far from it"]
    return markdown(head, lines)


def _interval(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            f"{own['target']}, w {own['scale']:g}",
            f"{own['low']:.2g} to {own['high']:.2g}",
            row["guided"],
            f"{row['calls']:.1f}",
            estimated(row["error"]).plain(3),
            _percent(row["part"]["off"]),
            _percent(row["whole"]["off"]),
        ]
        for own in rows
        for row in own["rows"]
    ]
    head = ["target", "nonlinear", "guided", "predictions", "from guided everywhere", "off S_c", "off S"]
    return markdown(head, lines)


def _hunt(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        worst = row["worst"]
        lines.append(
            [
                row["process"],
                str(row["steps"]),
                str(row["tried"]),
                _percent(row["off"]),
                "–" if row["least scale"] is None else _short(row["least scale"]),
                _short(row["random"]),
                _short(row["climbed"]),
                f"{worst['scale']:.3g}",
                _percent(worst["off close by"]),
                str(worst["cured from"] or "–"),
            ]
        )
    head = [
        "process",
        "steps",
        "tried",
        "off",
        "from w",
        "farthest",
        "climbed to",
        "its w",
        "off close by",
        "on it from steps",
    ]
    return markdown(head, lines)


def _where(row: Mapping[str, Any], windows: Mapping[str, Sequence[float]]) -> list[str]:
    """Scale and window of a setting."""
    names: dict[float, str] = {0: "without the class", 1: "no guidance"}
    where = names.get(row["scale"], str(row["where"]))
    if row["where"] in windows:
        where += " {:.2g} to {:.2g}".format(*windows[row["where"]])
    return [f"{row['scale']:g}", where]


def _hallucination(found: Mapping[str, Any]) -> str:
    """Rates and cost, and then diversity against no guidance."""
    rates = ("wrong", "change", "against everywhere", "against critical", "asked", "served", "served change")
    rows, varied = [], []
    names = [name for name in found["rows"][0]["diversity"] if not name.startswith("histogram")]
    for row in found["rows"]:
        own, scale = _where(row, found["windows"]), row["scale"]
        left_out = {key for key in rates if key not in row or (key.startswith("against") and scale <= 1)}
        shown = ["–" if key in left_out else _percent(row[key]) for key in rates]
        rows.append([*own, *shown, f"{row['evaluations']:.0f}"])
        figures = [_figure(row["diversity"].get(name)) for name in names]
        varied.append([*own, estimated(row["spread"]).plain(2), *figures])
    head = [
        "w",
        "where",
        "wrong",
        "change",
        "against everywhere",
        "against critical",
        "class as asked",
        "right and as asked",
        "its change",
    ]
    text = markdown([*head, "predictions"], rows)
    return f"{text}\n{_index(found)}\n{markdown(['w', 'where', 'spread', *names], varied)}"


def _figure(own: Mapping[str, Any] | None) -> str:
    """A figure of diversity, its ratio to that without guidance, and the judgment."""
    if own is None or own["value"] is None or own["ratio"] is None:
        return "–"
    return f"{own['value']:.2f}: {Estimate(own['ratio'], own['ratio_se'] or 0.0, 0).plain(2)}, {own['judged']}"


def _index(found: Mapping[str, Any]) -> str:
    own = found["index"]
    last = own["first"] + own["length"] - 1
    return (
        f"{found['rows'][0]['n']} samples of each; critical: steps {own['first']} to {last} of {found['steps']}, with "
        f"{100 * own['inside']:.0f} % of all crossings of the index's threshold.\n"
    )


_PARTS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "failures": ("Failures by the assumptions that they break (classifier-free guidance, distance to S)", _failures),
    "exponents": ("How the distance to S_c grows: exponents of its 90 % quantile between neighbors", _exponents),
    "needed": ("Steps that are needed: share of samples off S_c", _needed),
    "noise": ("Initial noise that ends off S_c (w = 10, DDIM)", _noise),
    "interval": ("Guidance in the nonlinear interval alone", _interval),
    "hunt": ("The hunt: distances from S over its size", _hunt),
    "hallucination": ("Guided hallucination", _hallucination),
}


def tables(results: Mapping[str, Any]) -> str:
    """Return the figures as Markdown."""
    text = ""
    for name, own in results["cells"].items():
        text += f"\n{name}: distance to S, 99 % quantile / worst case, by scale and steps\n\n{_cells(own, _distances)}"
        text += f"\n{name}: share off S / off S_c, by scale and steps\n\n{_cells(own, _off)}"
    for key, (title, write) in _PARTS.items():
        if key in results:
            text += f"\n{title}\n\n{write(results[key])}"
    return text.lstrip("\n")


def _against_steps(own: Sequence[Mapping[str, Any]], title: str) -> Panel:
    """Worst distance to S against steps, one line per process, score and scale that occur."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for cell in own:
        lines.setdefault(f"{cell['target']}, {cell['process']}, {cell['score']}, w {cell['scale']:g}", []).append(cell)
    drawn = []
    for name, cells in lines.items():
        ordered = sorted(cells, key=lambda cell: cell["steps"])
        worst = [max(cell["whole"]["worst"], _LEAST) for cell in ordered]
        drawn.append(Line(name, [cell["steps"] for cell in ordered], worst, [None] * len(ordered)))
    return Panel(title, drawn, "steps", "worst distance to S")


def panels(results: Mapping[str, Any]) -> list[Panel]:
    """Return the plots: worst distance against steps of each study, and of the hunt."""
    out = [
        _against_steps([cell for cell in own if cell["form"] == "classifier-free"], name)
        for name, own in results["cells"].items()
    ]
    if "hunt" in results:
        lines = [
            Line(
                f"{name}, {what}",
                [row["steps"] for row in results["hunt"] if row["process"] == name],
                [max(row[what], _LEAST) for row in results["hunt"] if row["process"] == name],
                [None] * sum(row["process"] == name for row in results["hunt"]),
            )
            for name in dict.fromkeys(row["process"] for row in results["hunt"])
            for what in ("random", "climbed")
        ]
        out.append(Panel("hunt", lines, "steps", "farthest distance to S over its size"))
    return out
