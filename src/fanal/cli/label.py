"""`fanal label`: a person says which samples of a run are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fanal.cli.console import errors_shown, say, table

if TYPE_CHECKING:
    from fanal.hallucination.thresholds import Interval
    from fanal.labeling import Labels, Samples

EPILOG = """
Examples:\n
  fanal label my-run --open\n
  fanal label my-run --taxonomy classes.txt --seed 1\n
  fanal label my-run --summary --catch 0.9\n
  fanal label my-run --export labels.csv\n
  fanal guard ./my-model --run my-run --labels my-run/labels.json --catch 0.9 --out guarded
"""


def _percent(share: Interval | None) -> str:
    if share is None:
        return "–"
    return f"{100 * share.value:.1f} % ({100 * share.low:.1f} to {100 * share.high:.1f})"


def _show(samples: Samples, labels: Labels, tpr: float | None, fpr: float | None, flag: float | None) -> None:
    """Print what the labels say."""
    from fanal.labeling import summarize

    found = summarize(samples, labels, tpr=tpr, fpr=fpr, flag=flag)
    rows = [[name, _percent(share)] for name, share in found.classes.items()]
    table(
        ["class", "share of the labeled samples, 95 % interval"],
        [*rows, ["wrong, all together", _percent(found.wrong)]],
    )
    judged = len(labels.codes) - found.unsure
    say(f"{judged} of {found.count} samples have a class; unsure, and in no rate: {found.unsure}.")
    if found.verifier is not None:
        told = found.verifier
        words = f"Right or wrong as the verifier says: {_percent(told.same)}, kappa {told.kappa:.2f}"
        words += f"; the same class: {_percent(told.same_class)}" if told.same_class else ""
        right, alarm, missed, wrong = told.table
        say(words + ".")
        say(f"Both right {right}, both wrong {wrong}; wrong for the verifier alone {alarm}, for you alone {missed}.")
    if found.auc is not None and found.caught is not None:
        say(f"AUC of the risk: {found.auc.plain()}; it catches {found.caught.percent()} at 20 % false alarms.")
    elif samples.risk is not None:
        say("The risk can be judged when there are labels of right and of wrong samples.")
    if found.threshold is not None:
        limit = found.threshold
        say(
            f"Threshold {limit.value:.6g} (95 % interval {limit.low:.4g} to {limit.high:.4g}): flags "
            f"{_percent(limit.flagged)}, catches {_percent(limit.caught)} of the wrong, disturbs "
            f"{_percent(limit.alarms)} of the right."
        )


def _serve(samples: Samples, labels: Labels, port: int, show_risk: bool, show: bool) -> None:
    """Serve the page until Ctrl-C."""
    from filelock import FileLock, Timeout

    from fanal.errors import FanalError, reason
    from fanal.labeling import LabelServer

    lock = FileLock(samples.folder / f".{samples.file.name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FanalError(f"another fanal label works on {samples.file}: stop it first") from None
    except OSError as error:
        raise FanalError(f"cannot write {samples.folder}: {reason(error)}") from error
    try:
        with LabelServer(samples, labels, port=port, show_risk=show_risk) as server:
            say(f"{len(labels.codes)} of {labels.count} samples are labeled; label the others at")
            say(server.url)
            say(f"Labels are saved in {samples.file}; press Ctrl-C when you are done.")
            if show:
                typer.launch(server.url)
            server.serve_forever()
    except KeyboardInterrupt:
        say(f"{len(labels.codes)} of {labels.count} samples are labeled; fanal label {samples.folder} goes on.")
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def label(
    folder: Annotated[Path, typer.Argument(help="Run folder of fanal sample, guard or demo.")],
    taxonomy: Annotated[
        str | None,
        typer.Option(
            help="hands, faces, a data set with a verifier, or a text file with one class per line, right first.",
            show_default="those of the run's verifier, else hands",
        ),
    ] = None,
    tensor: Annotated[
        str | None,
        typer.Option(help="Samples to label, e.g. x or x.redo.", show_default="those before any repair"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the samples.", min=0, show_default="0")] = None,
    show_risk: Annotated[
        bool, typer.Option("--show-risk", help="Tell the risk; without it, labels are blind.")
    ] = False,
    port: Annotated[int, typer.Option(help="Port on this machine; 0 takes a free one.", min=0, max=65535)] = 0,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    summary: Annotated[bool, typer.Option("--summary", help="Say what the labels say, and serve nothing.")] = False,
    catch: Annotated[
        float | None, typer.Option(help="With --summary: threshold that catches this share of the wrong samples.")
    ] = None,
    alarms: Annotated[
        float | None, typer.Option(help="With --summary: threshold that flags this share of the right samples.")
    ] = None,
    flag: Annotated[
        float | None, typer.Option(help="With --summary: threshold that flags this share of all samples.")
    ] = None,
    export: Annotated[Path | None, typer.Option(help="Write the labels as CSV, and serve nothing.")] = None,
) -> None:
    """Label a run's samples on a page that this machine serves to itself.

    Keys: digits name a class, 0 is unsure, u takes the last label back, arrows and the space bar move.

    Every click is saved at once in the run folder; the same command goes on where you stopped.
    """
    with errors_shown(resumable=True):
        from fanal.errors import FanalError
        from fanal.labeling import export_csv, open_labels, read_samples

        if not summary and (catch is not None or alarms is not None or flag is not None):
            raise FanalError("--catch, --alarms and --flag set a threshold from the labels: give --summary too")
        samples = read_samples(folder, tensor)
        labels = open_labels(samples, taxonomy, seed)
        if (summary or export is not None) and not labels.codes:
            raise FanalError(f"{samples.file} holds no label yet: fanal label {folder} serves a page to set some")
        if summary:
            _show(samples, labels, catch, alarms, flag)
        if export is not None:
            export_csv(export, samples, labels)
            say(f"labels: {export}")
        if not summary and export is None:
            _serve(samples, labels, port, show_risk, show)
