"""How the options of a command become the fields of its configuration."""

from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from fanal.cli import options
from fanal.errors import FanalError


def given(*words):
    """What `options.given` says of a command's options."""
    app, seen = typer.Typer(), {}

    @app.command()
    def command(
        context: typer.Context,
        model: str,
        out: options.Out = Path("run"),
        label: options.Label = None,
        against: Annotated[list[str] | None, typer.Option()] = None,
        captions: options.Captions = None,
        window: Annotated[tuple[float, float] | None, typer.Option()] = None,
        steps: options.Steps = 40,
        zero: options.Zero = True,
        spoken: bool = False,
        figures: options.Figures = None,
        overwrite: options.Overwrite = False,
    ):
        seen.update(options.given(context, "spoken", steps=2 * steps))

    told = CliRunner().invoke(app, [str(word) for word in words])
    assert told.exit_code == 0, told.output
    return seen


def test_options_are_fields_and_those_of_the_run_folder_are_not():
    words = ("net", "--out", "a", "--label", 3, "--against", "b", "--against", "c", "--captions", "d.txt")
    found = given(*words, "--window", 1, 2, "--steps", 5, "--no-zero", "--spoken", "--figures", "pdf", "--overwrite")
    wanted = {"model": "net", "label": 3, "against": ("b", "c"), "captions": "d.txt", "window": (1.0, 2.0)}
    assert found == {**wanted, "steps": 10, "zero": False}
    assert type(found["captions"]) is str


def test_what_was_not_given_has_its_default():
    found = given("net")
    wanted = {"model": "net", "label": None, "against": (), "captions": None, "window": None}
    assert found == {**wanted, "steps": 80, "zero": True}


@pytest.mark.parametrize(
    ("word", "label"),
    [
        ("3", 3),
        ("-1", -1),
        ("each", "each"),
        ("6 fingers", "6 fingers"),
        ("--5", "--5"),
        ("-", "-"),
        ("7" * 5000, "7" * 5000),
    ],
)
def test_a_label_is_a_number_or_a_name(word, label):
    assert given("net", f"--label={word}")["label"] == label


@pytest.mark.parametrize("text", ["", "6,", "a", "1.5", "-2", "6;12", "²", "1" * 5000])
def test_whole_numbers_are_read_or_refused_by_their_options_name(text):
    assert options.whole_numbers("6, 12,24", "--calls") == (6, 12, 24)
    with pytest.raises(FanalError, match="--calls takes whole numbers with commas"):
        options.whole_numbers(text, "--calls")
