"""`fanal bench`: comparisons that reproduce the tables of the documentation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fanal.cli import options
from fanal.cli.console import errors_shown, finished, progress, say
from fanal.errors import FanalError

app = typer.Typer(help="Run the comparisons behind the documentation's tables.", no_args_is_help=True)

_Mixtures = Annotated[int | None, typer.Option(help="Number of mixtures. \\[default: 10]", min=0)]
_Models = Annotated[
    str | None, typer.Option(help="Embedded models, with commas; empty: none. \\[default: hands32,shapes32]")
]
_Seed = Annotated[int, typer.Option(help="Run seed of all samples.", min=0)]


@app.command(
    "schedules",
    epilog="Examples:\n\n  fanal bench schedules --quick --out quick\n\n  "
    "fanal bench schedules --mixtures 0 --models hands32 --solvers ipndm:order=3,heun --calls 6,10 --out hands\n\n  "
    "fanal bench schedules --out bench-schedules",
)
def schedules(
    out: options.Out = Path("bench-schedules"),
    quick: Annotated[bool, typer.Option("--quick", help="Two mixtures and two solvers: seconds, not minutes.")] = False,
    mixtures: _Mixtures = None,
    models: _Models = None,
    chosen: Annotated[
        str | None, typer.Option("--solvers", help="Solvers, with commas. \\[default: six, with their orders]")
    ] = None,
    calls: Annotated[
        str | None, typer.Option(help="Budgets of network calls, with commas. \\[default: 5,6,8,10]")
    ] = None,
    seed: _Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Compare fixed grids, GITS and fitted grids on ten mixtures and two embedded models.

    When it is stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.bench.plans import compare
        from fanal.bench.schedules import SchedulesConfig

        config = _replaced(
            SchedulesConfig.quick() if quick else SchedulesConfig(),
            mixtures=mixtures,
            models=_listed(models),
            solvers=_listed(chosen),
            model_solvers=_listed(chosen),
            calls=_numbers(calls, "--calls"),
            model_calls=_numbers(calls, "--calls"),
            seed=seed,
        )
        _bench(compare, config, out, overwrite)


@app.command(
    "solvers",
    epilog="Examples:\n\n  fanal bench solvers --quick --out quick\n\n  "
    "fanal bench solvers --solvers heun,dpmpp:order=2 --schedules logsnr,polynomial:rho=5 --models '' --out two\n\n  "
    "fanal bench solvers --out bench-solvers",
)
def solvers(
    out: options.Out = Path("bench-solvers"),
    quick: Annotated[bool, typer.Option("--quick", help="Two mixtures, two grids, no model: seconds.")] = False,
    mixtures: _Mixtures = None,
    models: _Models = None,
    chosen: Annotated[
        str | None, typer.Option("--solvers", help="Solvers, with commas. \\[default: all, with their orders]")
    ] = None,
    schedules: Annotated[
        str | None, typer.Option(help="Grids, with commas. \\[default: five on mixtures, two on models]")
    ] = None,
    calls: Annotated[
        str | None, typer.Option(help="Budgets of network calls, with commas. \\[default: 6,12,24,48; on models to 24]")
    ] = None,
    seed: _Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Measure error against calls of every solver on every grid, on ten mixtures and two embedded models.

    Solvers that draw noise are judged by their samples: kernel distance, and the data's rule on models. When it is
    stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.bench.plans import compare
        from fanal.bench.solvers import SolversConfig

        config = _replaced(
            SolversConfig.quick() if quick else SolversConfig(),
            mixtures=mixtures,
            models=_listed(models),
            solvers=_listed(chosen),
            schedules=_listed(schedules),
            model_schedules=_listed(schedules),
            calls=_numbers(calls, "--calls"),
            model_calls=_numbers(calls, "--calls"),
            seed=seed,
        )
        _bench(compare, config, out, overwrite)


@app.command(
    "jumps",
    epilog="Examples:\n\n  fanal bench jumps grid2 --steps 10 --count 64 --out jumps\n\n  "
    "fanal bench jumps hands32 --solver heun --steps 40 --out jumps\n\n  "
    "fanal bench jumps hands32 --schedule searched.json --solver searched.json --steps 8 --out gits-jump\n\n  "
    "fanal bench jumps diffusers:DIR --captions captions.txt --guidance 7.5 --real photos.zip "
    "--features inception:FILE --steps 50 --solver pndm --out latent-jumps",
)
def jumps(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model spec; give --real where its card names no data.")],
    solver: Annotated[str, typer.Option(help="Solver, or a schedule file's own.")] = "heun",
    schedule: Annotated[str | None, typer.Option(help="Grid, or a schedule file. \\[default: polynomial]")] = None,
    steps: Annotated[int, typer.Option(help="Intervals of the full run.", min=1)] = 40,
    count: Annotated[int, typer.Option(help="Samples the jump is chosen on, and as many it is reported on.")] = 512,
    real: Annotated[
        str | None, typer.Option(help="Real samples, as in fanal eval. \\[default: held-out ones of the card's data]")
    ] = None,
    features: Annotated[str, typer.Option(help="Features of the distances, as in fanal eval.")] = "auto",
    label: options.Label = None,
    prompt: options.Prompt = None,
    captions: options.Captions = None,
    negative: options.Negative = "",
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    block: options.Block = 64,
    allow_bin: options.AllowBin = False,
    device: options.Device = "cpu",
    out: options.Out = Path("bench-jumps"),
    overwrite: options.Overwrite = False,
) -> None:
    """Measure quality against calls for runs that jump to their denoised prediction at any node, or just stop there.

    The jump step is chosen on one half of the samples and reported on the other. When it is stopped, the same command
    goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.bench.jumps import JumpsConfig
        from fanal.bench.plans import compare

        _bench(compare, JumpsConfig(**options.given(context)), out, overwrite)


@app.command(
    "gits",
    epilog="Examples:\n\n  fanal bench gits grid2 --quick --out quick\n\n  "
    "fanal bench gits hands32 shapes32 digits8 grid2 --studies transfer --out transfer\n\n  "
    "fanal bench gits hands32 --studies warmups,coeffs --test 256 --out ablations",
)
def gits(
    models: Annotated[list[str], typer.Argument(help="Models whose cards name their data.")],
    studies: Annotated[
        str | None,
        typer.Option(
            help="What to study, with commas: solvers, transfer, nodes, teachers, warmups, coeffs, metrics, alone, "
            "proofs. \\[default: all]"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few samples and budgets: seconds on a small model.")] = False,
    test: Annotated[
        int | None, typer.Option(help="Test samples of each model. \\[default: 64; 128 of small ones]")
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Warm-up samples of a search. \\[default: 32]")] = None,
    seed: _Seed = 0,
    out: options.Out = Path("bench-gits"),
    overwrite: options.Overwrite = False,
) -> None:
    """Repeat the published experiments on GITS: solvers, grid, teacher, warm-up, coefficient, transfer and more.

    When it is stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.bench.gits import GitsConfig
        from fanal.bench.gits_subject import Sizes
        from fanal.bench.plans import compare

        sizes = _replaced(Sizes.quick() if quick else Sizes(), test=test, light=test, warmup=warmup)
        config = _replaced(GitsConfig(tuple(models), sizes=sizes, seed=seed), studies=_listed(studies))
        _bench(compare, config, out, overwrite)


@app.command(
    "support",
    epilog="Examples:\n\n  fanal bench support --quick --out quick\n\n  "
    "fanal bench support --studies hunt --out hunt\n\n  "
    "fanal bench support --studies hallucination --model ./shapes-told --samples 1024 --out guided",
)
def support(
    studies: Annotated[
        str | None,
        typer.Option(
            help="What to study, with commas: grid, forms, targets, errors, limit, noise, interval, hunt, "
            "hallucination. \\[default: all; the last needs --model]"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few samples, scales and steps: seconds.")] = False,
    count: Annotated[int | None, typer.Option(help="Samples of each cell. \\[default: 128]", min=2)] = None,
    model: Annotated[
        str | None, typer.Option(help="Conditional model of data with a rule, for the study hallucination.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples of each setting of that study.", min=8)] = 512,
    steps: Annotated[int, typer.Option(help="Steps of its runs.", min=5)] = 20,
    near: options.Near = 0.01,
    seed: _Seed = 0,
    out: options.Out = Path("bench-support"),
    overwrite: options.Overwrite = False,
) -> None:
    """Measure how far guided runs end from the support: form, scale, steps, process, score; hunt for counter-examples.

    When it is stopped, the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.bench.plans import compare
        from fanal.bench.support import SupportConfig
        from fanal.bench.support_studies import Sizes

        sizes = _replaced(Sizes.quick() if quick else Sizes(), count=count)
        config = SupportConfig(model=model, samples=samples, steps=steps, sizes=sizes, near=near, seed=seed)
        _bench(compare, _replaced(config, studies=_listed(studies)), out, overwrite)


@app.command(
    "overlay",
    epilog="Examples:\n\n  fanal bench overlay --quick --out quick\n\n  "
    "fanal bench overlay --law two-bumps --steps 160 --budgets 5,10,20,40,80,160 --out bumps\n\n  "
    "fanal bench overlay --out bench-overlay",
)
def overlay(
    law: Annotated[str, typer.Option(help="Law of the data, as in fanal pde: ring, two-bumps or box.")] = "ring",
    steps: Annotated[
        int | None, typer.Option(help="Steps of the density and of the particles that are shown. \\[default: 80]")
    ] = None,
    cells: Annotated[int | None, typer.Option(help="Cells of the density, per axis. \\[default: 80]")] = None,
    count: Annotated[int | None, typer.Option(help="Particles. \\[default: 2000]")] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Steps to compare, with commas. \\[default: 5,10,20,40,80]")
    ] = None,
    iterations: Annotated[
        str | None,
        typer.Option(help="Iterations of training to compare, with commas. \\[default: 100,400,1600,4000]"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few cells, particles and iterations: seconds.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of draws, noise and training.", min=0)] = 0,
    out: options.Out = Path("bench-overlay"),
    overwrite: options.Overwrite = False,
) -> None:
    """Solve one reverse diffusion three ways, as a density, as particles and with a network, over each other.

    The run folder holds run.json, tables.md and report.html, an animated page that opens offline. When it is stopped,
    the same command goes on where it was.
    """
    with errors_shown(resumable=True):
        from fanal.bench.overlay import OverlayConfig
        from fanal.bench.overlay import overlay as solve

        config = _replaced(
            OverlayConfig.quick() if quick else OverlayConfig(),
            law=law,
            steps=steps,
            cells=cells,
            count=count,
            budgets=_numbers(budgets, "--budgets"),
            iterations=_numbers(iterations, "--iterations"),
            seed=seed,
        )
        folder = _bench(solve, config, out, overwrite)
        say(f"page: {folder / 'report.html'}")


@app.command(
    "hallucination",
    epilog="Examples:\n\n  fanal bench hallucination --quick --out quick\n\n  "
    "fanal bench hallucination --models hands32 --methods cas,temperature,renoise --count 1024 --out hands\n\n  "
    "fanal bench hallucination --models hands32 --methods heun --method my_module:my_method --out mine\n\n  "
    "fanal bench hallucination --out bench-hallucination",
)
def hallucination(
    out: options.Out = Path("bench-hallucination"),
    quick: Annotated[bool, typer.Option("--quick", help="The plane, four methods: seconds.")] = False,
    models: Annotated[
        str | None, typer.Option(help="Models whose data have a rule. \\[default: grid2,shapes32,hands32]")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Samples of the plain run and of each method. \\[default: 4096]")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Built-in methods, with commas; NAME=COUNT sets its samples; empty: none. \\[default: all]"),
    ] = None,
    detectors: Annotated[
        str | None, typer.Option(help="Detectors, name or name:field=value,…, with commas. \\[default: all]")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A method of yours, as module:function; may be given twice.")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Calls and products per sample. \\[default: 60]")] = None,
    calibration: Annotated[
        int | None, typer.Option(help="Samples that thresholds come from. \\[default: 1024]")
    ] = None,
    looks: Annotated[int | None, typer.Option(help="Samples that costly detectors see. \\[default: 512]")] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Measure who finds and who mends the samples that a rule calls wrong, what that costs, and what variety is lost.

    When it is stopped, the same command goes on where it was, also with more models, methods or samples.
    """
    with errors_shown(resumable=True):
        from fanal.bench.hallucination import HallucinationConfig, bench_hallucination

        config = _replaced(
            HallucinationConfig.quick() if quick else HallucinationConfig(),
            models=_listed(models),
            count=count,
            methods=None if methods is None else _counted(methods),
            detectors=_listed(detectors),
            submissions=tuple(method or ()),
            budget=budget,
            calibration=calibration,
            looks=looks,
        )
        folder = _bench(bench_hallucination, config, out, overwrite)
        say(f"tables, plots and sheets: {folder}")


def _bench(run: Callable[..., Path], config: Any, out: Path, overwrite: bool) -> Path:
    """Run a comparison and print its tables."""
    folder = run(config, out, overwrite=overwrite, progress=progress, say=say)
    with finished(folder):
        say((folder / "tables.md").read_text(encoding="utf-8"))
    say(f"run: {folder}")
    return folder


def _replaced(start: Any, **given: Any) -> Any:
    """Settings with the values that are given."""
    return dataclasses.replace(start, **{name: value for name, value in given.items() if value is not None})


def _counted(text: str) -> dict[str, int | None]:
    """Read methods with commas, each with its number of samples where one is given: `cas,heun=512`."""
    found: dict[str, int | None] = {}
    for part in filter(None, text.split(",")):
        name, equals, number = part.partition("=")
        if equals and not number.isdecimal():
            raise FanalError(f"--methods takes NAME or NAME=COUNT with commas, such as cas,heun=512, got {part!r}")
        found[name] = int(number) if equals else None
    return found


def _listed(text: str | None) -> tuple[str, ...] | None:
    """Split at commas; `name:a=1,b=2` stays whole, since a part with `=` but no colon goes on with the one before."""
    if text is None:
        return None
    parts: list[str] = []
    for part in filter(None, text.split(",")):
        if parts and "=" in part and ":" not in part.partition("=")[0]:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return tuple(parts)


def _numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    return None if text is None else options.whole_numbers(text, option)
