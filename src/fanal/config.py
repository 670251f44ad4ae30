"""Text → objects: solvers and schedules as written on the command line, `name` or `name:field=value,…`."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from fanal.errors import FanalError, unknown_name
from fanal.hallucination.detectors import DETECTORS, Detector
from fanal.hallucination.repair import REPAIRS, Repair
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


def _value(text: str, default: Any, where: str) -> Any:
    """Read a text as the kind of thing its field's default is."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, int):
            return int(text)
        if isinstance(default, float):
            return float(text)
        if isinstance(default, tuple):
            low, high = text.split("..")
            return float(low), float(high)
        if isinstance(default, str) and text.isdecimal():
            return int(text)  # a field that takes a word or a number, such as lower_final
    except (ValueError, KeyError):
        raise FanalError(f"{where} must be like {default!r}, got {text!r}") from None
    return text


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
    if isinstance(value, tuple) and len(value) == 2:
        return f"{value[0]}..{value[1]}"
    return str(value)


def build_repair(text: str, hints: Mapping[str, Any] | None = None) -> Repair:
    """Build a repair from `name` or `name:field=value,…`, e.g. `redo:kappa=0.1,window=0.5..20`.

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
    values = {key: _value(value, getattr(default, key), f"{name}:{key}") for key, value in options.items()}
    own = {key: tuple(v) if isinstance(v, list) else v for key, v in (hints or {}).items() if key in fields_of(name)}
    return dataclasses.replace(default, **{**own, **values})


def build_detector(text: str, window: tuple[float, float]) -> Detector:
    """Build a detector from `name` or `name:field=value,…`, e.g. `rods_index:v=score`.

    Args:
        text: as written on the command line; a window in it counts before the other.
        window: closed range of sigma that it looks at.

    Raises:
        FanalError: the name, a field or a value is not one of the detector's.
    """

    def fields_of(name: str) -> list[str]:
        return [field.name for field in dataclasses.fields(DETECTORS[name]) if field.init]

    name, options = parse_options("detector", text, DETECTORS, fields_of)
    default = DETECTORS[name](window) if "window" in fields_of(name) else DETECTORS[name]()
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
