"""Importing fanal and asking it for help is fast and touches no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import fanal
from toys import environment, script

HELPS = """
import json, sys
from typer.main import get_command
from typer.testing import CliRunner
from fanal.cli import app

found = {}

def walk(command, path):
    result = CliRunner().invoke(app, [*path, "--help"])
    found[" ".join(path)] = [result.exit_code, result.output, bool(getattr(command, "commands", None))]
    for name, child in getattr(command, "commands", {}).items():
        walk(child, [*path, name])

walk(get_command(app), [])
print(json.dumps({"helps": found, "modules": sorted(sys.modules)}))
"""


def python(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def helps():
    """The help of every command, asked for in a fresh process, and what that process imported."""
    return python(HELPS)


@pytest.mark.parametrize("code", ["import fanal", "import fanal.cli", "import fanal; dir(fanal); fanal.__version__"])
def test_importing_it_loads_no_torch(code):
    modules = python(f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))")
    assert "fanal" in modules
    assert not {"torch", "numpy", "scipy", "plotly", "PIL"} & set(modules)


def test_using_it_does_load_torch():
    modules = python("import fanal; fanal.noise\nimport json, sys; print(json.dumps(sorted(sys.modules)))")
    assert "torch" in modules


def test_no_help_loads_torch(helps):
    known = {"", "demo", "models", "models list", "models info", "sample", "interpolate", "train", "convert", "report"}
    assert known <= helps["helps"].keys()
    assert not {"torch", "numpy", "scipy", "plotly", "PIL"} & set(helps["modules"])


def test_every_command_has_help_with_an_example_that_names_it(helps):
    for name, (code, text, group) in helps["helps"].items():
        assert code == 0, name
        if not group:
            assert "Example" in text, name
            assert f"fanal {name}" in text.split("Example", 1)[1], name


def test_help_answers_at_once():
    best = float("inf")
    for _ in range(5):  # processor time, since this machine may be busy with something else
        run = subprocess.Popen([*script(), "--help"], stdout=subprocess.DEVNULL, env=environment())
        _, status, used = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
        assert run.returncode == 0
        best = min(best, used.ru_utime + used.ru_stime)
    assert best < 0.5


def test_every_public_name_resolves():
    assert fanal.__all__ == sorted(set(fanal.__all__))
    for name in fanal.__all__:
        assert getattr(fanal, name) is not None
    assert {"load", "noise", "sample", "trace", "Trajectory", "schedules", "solvers", "exact"} <= set(fanal.__all__)
    assert set(fanal.__all__) <= set(dir(fanal))
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        fanal.smaple  # noqa: B018


def test_the_version_is_the_packages():
    run = subprocess.run([*script(), "--version"], capture_output=True, text=True, check=True, env=environment())
    assert run.stdout.strip() == fanal.__version__
