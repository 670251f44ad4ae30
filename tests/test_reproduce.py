"""Slow: training an embedded model again gives its loss and its share of wrong samples, within two standard errors."""

import math

import pytest
from typer.testing import CliRunner

from fanal.cli import app
from fanal.loading import card, embedded

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", embedded())
def test_training_again_reproduces_the_card(name, tmp_path):
    done = CliRunner().invoke(app, ["train", name, "--out", str(tmp_path / name)])
    assert done.exit_code == 0, done.output
    shipped, again = card(name), card(str(tmp_path / name))
    assert again["recipe"] == shipped["recipe"]
    loss = [about["held_out_loss"] for about in (shipped, again)]
    # Both losses are measured on the same held-out samples and noise, so one standard error is generous.
    assert abs(loss[0]["mean"] - loss[1]["mean"]) <= 2 * loss[0]["standard_error"]
    if "hallucination" in shipped:
        wrong = [about["hallucination"] for about in (shipped, again)]
        error = math.hypot(wrong[0]["se"], wrong[1]["se"])
        assert abs(wrong[0]["value"] - wrong[1]["value"]) <= 2 * error
