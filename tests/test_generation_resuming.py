"""Runs of `fanal sample` that are stopped, killed or out of room go on to the same bits."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import time

import pytest

import generated
from fanal import flagging, generation
from fanal.errors import FanalError
from fanal.generation import generate
from generated import SMALL, Stop
from toys import environment, fanal, part_of, process, record, refused, same, samples, script

# Fixtures
the_toys_count_only_where_asked = generated.the_toys_count_only_where_asked
net = generated.net


@pytest.mark.parametrize(
    ("model", "guard", "after"),
    [
        ("mixture:grid2", (), 0),
        ("mixture:grid2", (), 3),
        ("mixture:grid2", ("redo", "renoise"), 0),
        ("mixture:grid2", ("redo", "renoise"), 1),
        ("net", (), 3),
        ("net", ("redo", "renoise"), 1),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, net, guard, model, after):
    config = dataclasses.replace(SMALL, model=net if model == "net" else model, guard=guard, solver="churn")
    whole = samples(generate(config, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        generate(config, tmp_path / "cut", progress=Stop(after))
    assert not (tmp_path / "cut").exists()
    assert len(list(part_of(tmp_path / "cut").glob("block-*"))) == after
    told = []
    folder = generate(config, tmp_path / "cut", say=told.append)
    assert any(f"resuming: {after} blocks" in line for line in told) == (after > 0)
    assert same(samples(folder), whole)


def test_a_stop_while_the_page_is_written_costs_no_block(tmp_path, monkeypatch):
    import fanal.report

    def stop(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(fanal.report, "write_report", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(SMALL, tmp_path / "cut")
    monkeypatch.undo()
    monkeypatch.setattr(generation, "watch", lambda *a, **k: pytest.fail("a block was computed again"))
    folder = generate(SMALL, tmp_path / "cut")
    monkeypatch.undo()
    assert same(samples(folder), samples(generate(SMALL, tmp_path / "whole")))


def test_a_stop_in_the_calibration_can_be_resumed(tmp_path):
    config = dataclasses.replace(SMALL, guard=("redo",))
    with pytest.raises(KeyboardInterrupt):
        generate(config, tmp_path / "cut", progress=Stop(2, "calibrating"))
    assert same(samples(generate(config, tmp_path / "cut")), samples(generate(config, tmp_path / "whole")))


def test_a_resumed_run_never_changes_its_calibration(tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, guard=("redo",))
    with pytest.raises(KeyboardInterrupt):
        generate(config, tmp_path / "cut", progress=Stop(2))
    monkeypatch.setattr(flagging, "watch", lambda *a, **k: pytest.fail("calibrated again"))
    generate(config, tmp_path / "cut")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 9}, "steps: 8 there, 9 here"),
        ({"seed": 3}, "seed: 2 there, 3 here"),
        ({"solver": "heun"}, "solver: 'euler' there, 'heun' here"),
        ({"threads": 2}, "threads: 1 there, 2 here"),
        ({"count": 23}, "count: 22 there, 23 here"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(tmp_path, change, words):
    with pytest.raises(KeyboardInterrupt):
        generate(SMALL, tmp_path / "run", progress=Stop(2))
    other = dataclasses.replace(SMALL, **change)
    with pytest.raises(FanalError, match=words):
        generate(other, tmp_path / "run")
    assert len(list(part_of(tmp_path / "run").glob("block-*"))) == 2
    assert record(generate(other, tmp_path / "run", overwrite=True))["config"] == {
        **dataclasses.asdict(other),
        "guard": [],
    }


def wait_for_blocks(out, run, count=2):
    """Wait until a process has stored some blocks, and is still at work."""
    deadline = time.monotonic() + 120
    while len(list(part_of(out).glob("block-*.safetensors"))) < count:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


COMMAND = ("sample", "python:toys:logged", "--steps", 6, "--count", 40, "--block", 4, "--solver", "churn")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What COMMAND gives when nobody disturbs it, in a process of its own."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run = process(*COMMAND, "--out", out, env=environment())
    told, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert f"report: {out / 'report.html'}" in told
    return samples(out)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_command_goes_on_to_the_same_bits(tmp_path, uninterrupted, kill):
    out = tmp_path / "run"
    run = process(
        *COMMAND,
        "--out",
        out,
        env=environment(FANAL_TEST_SLEEP="0.02"),
        # A parent in the background hands down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_for_blocks(out, run)
        run.send_signal(kill)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert not out.exists()
    if kill == signal.SIGINT:
        assert run.returncode == 130
        assert errors.strip() == "stopped; run the same command again to go on"
    else:
        assert run.returncode == -signal.SIGKILL
    stored = len(list(part_of(out).glob("block-*.safetensors")))
    assert 2 <= stored < 10
    shutil.copytree(part_of(out), part_of(tmp_path / "other"))
    assert refused(fanal(*COMMAND, "--steps", 7, "--out", tmp_path / "other"), "steps: 6 there, 7 here")
    again = fanal(*COMMAND, "--out", out)
    assert again.exit_code == 0, again.output
    assert f"resuming: {stored} blocks are there already" in again.stdout
    assert same(samples(out), uninterrupted)
    assert not part_of(out).exists()
    assert record(out)["network"]["evaluations"] == float(samples(out)["evaluations"].sum())


def limited(size):
    """Forbid a process files larger than this, as a disk that fills up would."""
    import resource

    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(("size", "left"), [(10_000, []), (1_000_000, [".run.part"])])
def test_a_full_disk_is_an_error_and_leaves_nothing_half_written(tmp_path, size, left):
    # The first limit stops the first block, the second the page, when all blocks are there.
    out = tmp_path / "run"
    words = ("sample", "mixture:grid2", "--steps", 4, "--count", 3000, "--block", 1500, "--out", out)
    run = subprocess.run(
        [*script(), *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(),
        preexec_fn=limited(size),
        timeout=120,
    )
    assert run.returncode == 2, run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert "cannot write" in run.stderr
    assert "free some space" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == left
    if left:
        names = {path.name for path in part_of(out).iterdir()}
        assert names == {"run.json", "block-000000.safetensors", "block-000001.safetensors", *WRITTEN}
        again = fanal(*words)
        assert again.exit_code == 0, again.output
        assert "resuming: 2 blocks" in again.stdout
        assert sorted(path.name for path in out.iterdir()) == sorted(["report.html", "run.json", *WRITTEN])


WRITTEN = ("samples.png", "samples.safetensors")
