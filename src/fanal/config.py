"""Text → objects: solvers and schedules as written on the command line, `name` or `name:field=value,…`."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fanal.errors import FanalError, unknown_name
from fanal.hallucination import REPAIRS, Repair
from fanal.hallucination.detectors import DETECTORS, FITTED, Detector
from fanal.hallucination.hints import tuples
from fanal.hallucination.rods import Guard
from fanal.sampling import Solver
from fanal.schedules import SCHEDULES, from_file, table, tables
from fanal.schedules.files import holds_many
from fanal.solvers import SOLVERS

__all__ = [
    "NAMED",
    "build_detector",
    "build_repair",
    "build_schedule",
    "build_solver",
    "check_detector",
    "fitted_options",
    "parse_options",
    "split_settings",
]

NAMED: dict[str, type] = {**SOLVERS, "rods": Guard}
"""What the command line calls a solver: name → class; all solvers, and the guard around them."""


def _parts(text: str) -> list[str]:
    """Split at commas that are not in parentheses, which hold another solver's fields."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part]


def split_settings(text: str) -> tuple[str, str]:
    """Split `PLACE,field=value,…` into the place, which may hold commas, and the settings."""
    parts = text.split(",")
    last = len(parts)
    while last > 1 and "=" in parts[last - 1]:
        last -= 1
    return ",".join(parts[:last]), ",".join(parts[last:])


def parse_options(kind: str, text: str, known: Iterable[str], fields_of: Callable[[str], Iterable[str]]) -> tuple:
    """Split `name:field=value,…` into the name and a dict of texts, refusing names and fields that do not exist.

    Raises:
        FanalError: the name or a field is unknown, or a field has no value.
    """
    name, _, rest = text.partition(":")
    if name not in known:
        raise unknown_name(kind, name, known)
    fields = list(fields_of(name))
    options: dict[str, str] = {}
    for part in _parts(rest):
        key, equals, value = part.partition("=")
        if not equals:
            raise FanalError(
                f"{kind} {text!r}: expected field=value, got {part!r}; fields: {', '.join(fields) or 'none'}"
            )
        if key not in fields:
            raise (
                unknown_name(f"field of {kind} {name}", key, fields) if fields else FanalError(f"{name} has no fields")
            )
        if key in options:
            raise FanalError(f"{kind} {text!r}: {key} is given twice")
        options[key] = value
    return name, options


def _value(text: str, default: Any, where: str, many: bool = False) -> Any:
    """Read a text as the kind of thing its field's default is; `many`: a tuple may have any length."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, int):
            return int(text)
        if isinstance(default, float):
            return float(text)
        if isinstance(default, tuple):
            return _list(text, default, many)
        if isinstance(default, str) and text.isdecimal():
            return int(text)  # a field that takes a word or a number, such as lower_final
    except (ValueError, KeyError):
        raise FanalError(f"{where} must be like {_written(default)}, got {text!r}") from None
    return text


def _list(text: str, default: tuple, many: bool) -> tuple:
    """Read `0.5..20` or, where the default has pairs, `2.3/12..8.1/16`."""
    parts = text.split("..")
    if not many and len(parts) != len(default):
        raise ValueError(f"{len(parts)} parts")
    if not isinstance(default[0], tuple):
        return tuple(map(float, parts))
    return tuple((float(first), int(second)) for first, second in (part.split("/") for part in parts))


def _unwrapped(text: str) -> str:
    """Take off one pair of parentheses around a text."""
    return text[1:-1] if text.startswith("(") and text.endswith(")") else text


def build_solver(text: str) -> Solver:
    """Build a solver from `name` or `name:field=value,…`, e.g. `churn:s_churn=20` or `ancestral:solver=heun`.

    A solver within a solver that has several fields stands in parentheses: `rods:solver=(dpmpp:order=3,predict=noise)`.
    A path that ends in `.json` is a schedule file: its solver, with its weights.

    Raises:
        FanalError: the name, a field or a value is not one of the solver's.
    """

    if text.endswith(".json"):
        from fanal.schedule_files import read_schedules

        return read_schedules(text).build_solver(build_solver)

    def likes(name: str) -> dict[str, Any]:
        # a field that is None by default says itself what its values look like
        default, fields = NAMED[name](), dataclasses.fields(NAMED[name])
        return {f.name: f.metadata.get("like", getattr(default, f.name)) for f in fields if f.init}

    def fields_of(name: str) -> list[str]:
        return list(likes(name))

    name, options = parse_options("solver", text, NAMED, fields_of)
    default = NAMED[name]()
    values = {
        key: build_solver(_unwrapped(value)) if key == "solver" else _value(value, likes(name)[key], f"{name}:{key}")
        for key, value in options.items()
    }
    return dataclasses.replace(default, **values)


def text_of(solver: Solver) -> str | None:
    """Return how a solver is written on the command line, so that `build_solver` gives it back; None: it cannot be."""
    for name, kind in NAMED.items():
        if type(solver) is kind:
            default, parts = kind(), []
            for field in dataclasses.fields(kind):
                value = getattr(solver, field.name)
                if field.init and value != getattr(default, field.name):
                    parts.append(f"{field.name}={_written(value)}")
            text = f"{name}:{','.join(parts)}" if parts else name
            with contextlib.suppress(FanalError):
                return text if build_solver(text) == solver else None
    return None


def _written(value: Any) -> str:
    if isinstance(value, Solver):
        return f"({text_of(value)})"
    if isinstance(value, tuple):
        return "..".join("/".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in value)
    return str(value)


def build_repair(text: str, hints: Mapping[str, Any] | None = None) -> Repair:
    """Build a repair from `name` or `name:field=value,…`, e.g. `redo:kappa=0.1,window=0.5..20`.

    The rungs of a ladder are pairs of sigma and steps: `ladder:rungs=1.4/10..2.3/12,accept=0.3..0.2`.

    Args:
        text: as written on the command line.
        hints: fields that the model's card asks for, where the text says nothing.

    Raises:
        FanalError: the name, a field or a value is not one of the repair's.
    """

    def fields_of(name: str) -> list[str]:
        return [field.name for field in dataclasses.fields(REPAIRS[name])]

    name, options = parse_options("guard", text, REPAIRS, fields_of)
    default = REPAIRS[name]()
    kinds = {field.name: str(field.type) for field in dataclasses.fields(REPAIRS[name])}
    values = {
        key: _value(value, getattr(default, key), f"{name}:{key}", "..." in kinds[key])
        for key, value in options.items()
    }
    own = {key: tuples(value) for key, value in (hints or {}).items() if key in fields_of(name)}
    return dataclasses.replace(default, **{**own, **values})


_OF_FITTED: dict[str, dict[str, Any]] = {
    "combined": {"file": "", "parts": "", "strength": 1.0},
    "probe": {"file": "", "sigmas": (0.8, 2.0), "strength": 0.01},
}


def _detector_fields(name: str) -> Sequence[str]:
    if name in FITTED:
        return list(_OF_FITTED[name])
    return [field.name for field in dataclasses.fields(DETECTORS[name]) if field.init]


def _detector_parts(text: str) -> tuple[str, dict[str, str]]:
    return parse_options("detector", text, [*DETECTORS, *FITTED], _detector_fields)


def fitted_options(text: str) -> dict[str, Any]:
    """Return the fields of a detector that is fitted to samples; {} for one that is not.

    `combined:parts=variance+undecided,strength=1`: a combination of these; `parts` is a tuple, () is all free ones.
    `probe:sigmas=0.8..2,strength=0.01`: a linear probe. Either with `file=PATH` alone: what was fitted before.

    Raises:
        FanalError: the name, a field or a value is not one of a detector's.
    """
    name, options = _detector_parts(text)
    if name not in FITTED:
        return {}
    defaults = _OF_FITTED[name]
    values = {key: _value(value, defaults[key], f"{name}:{key}", many=True) for key, value in options.items()}
    found = {**defaults, **values}
    if "parts" in found:
        found["parts"] = tuple(part for part in str(found["parts"]).split("+") if part)
        for part in found["parts"]:
            if part not in DETECTORS:
                raise unknown_name("part of a combination", part, DETECTORS)
    if not found["strength"] > 0 or not all(sigma > 0 for sigma in found.get("sigmas", ())):
        raise FanalError(f"detector {text!r}: strength and sigmas are numbers > 0")
    if "file" in options and len(options) > 1:
        raise FanalError(f"detector {text!r}: what is in a file is fitted already, give file alone")
    return found | {"file": str(found["file"])}


def check_detector(text: str) -> None:
    """Check what was written for a detector, before anything is opened.

    Raises:
        FanalError: the name, a field or a value is not one of a detector's.
    """
    if not fitted_options(text):
        build_detector(text, (0.0, 1.0))


def build_detector(text: str, window: tuple[float, float]) -> Detector:
    """Build a detector from `name` or `name:field=value,…`, e.g. `rods_index:v=score`.

    Args:
        text: as written on the command line; a window in it counts before the other.
        window: closed range of sigma that it looks at.

    Raises:
        FanalError: the name, a field or a value is not one of the detector's, or it has to be fitted.
    """
    name, options = _detector_parts(text)
    if name in FITTED:
        raise FanalError(f"{name} is fitted to labelled samples, as fanal guard --detector {name} does")
    default = DETECTORS[name](window) if "window" in _detector_fields(name) else DETECTORS[name]()
    values = {key: _value(value, getattr(default, key), f"{name}:{key}") for key, value in options.items()}
    return dataclasses.replace(default, **values)


def build_schedule(text: str, steps: int, sigma_min: float, sigma_max: float, *, zero: bool = True) -> Tensor:
    """Build a grid from `name` or `name:field=value,…`, e.g. `polynomial:rho=5`.

    A path that ends in `.json` is a schedule file, which has its own ends: its grid of so many steps, or its only one.
    A published table (`fanal.schedules.tables`) has its own ends too.

    Raises:
        FanalError: the name, a field or a value is not one of the schedule's.
    """
    if text.endswith(".json"):
        if not holds_many(text):
            return from_file(text)
        from fanal.schedule_files import read_schedules

        return read_schedules(text).grid(steps, sigma_min, sigma_max)
    own = {"steps", "sigma_min", "sigma_max", "zero"}

    def fields_of(name: str) -> list[str]:
        return [] if name in tables else [k for k in inspect.signature(SCHEDULES[name]).parameters if k not in own]

    name, options = parse_options("schedule", text, [*SCHEDULES, *tables], fields_of)
    if name in tables:
        return table(name, steps)
    defaults = inspect.signature(SCHEDULES[name]).parameters
    values = {key: _value(value, defaults[key].default, f"{name}:{key}") for key, value in options.items()}
    try:
        return SCHEDULES[name](steps, sigma_min=sigma_min, sigma_max=sigma_max, zero=zero, **values)
    except (OverflowError, ZeroDivisionError) as error:
        raise FanalError(f"schedule {text!r} leaves the range of numbers ({error}): try a milder value") from error
