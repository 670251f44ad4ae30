"""Run folders: whole or not there, resumed block by block, and never anybody else's."""

from __future__ import annotations

import json

import pytest
import torch

from fanal.errors import FanalError
from fanal.files import read_tensors
from fanal.runs import Run, versions
from toys import part_of, record, same


def work(value, done=None):
    def run():
        if done is not None:
            done.append(value)
        return {"x": torch.full((2, 3), float(value))}, {"value": value}

    return run


def start(out, config, error, act):
    with Run(out, "sample", config) as run:
        act(run)
        raise error


def stopped(out, config=None, *, error=None, act=lambda run: run.block(0, work(1))):
    """Begin a run, do something, and let an error (Ctrl-C unless told otherwise) end it."""
    error = error or KeyboardInterrupt()
    with pytest.raises(type(error)):
        start(out, config or {}, error, act)


def test_a_finished_run_holds_the_record_and_nothing_of_the_making(tmp_path):
    out = tmp_path / "deep" / "run"
    with Run(out, "sample", {"steps": 4}) as run:
        assert not out.exists()
        tensors, notes = run.block(0, work(7))
        assert notes == {"value": 7}
        assert float(tensors["x"][0, 0]) == 7
        run.path("notes.txt").write_text("kept")
        run.describe({"results": {"figure": 1.5}})
        assert not out.exists()
        assert run.finish() == out
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "run.json"]
    assert [path.name for path in out.parent.iterdir()] == ["run"]
    told = record(out)
    assert (told["command"], told["config"], told["results"]) == ("sample", {"steps": 4}, {"figure": 1.5})
    assert told["versions"] == versions()
    assert told["threads"] == torch.get_num_threads()


def test_blocks_are_computed_once_and_come_back_with_every_bit(tmp_path):
    done, x = [], torch.randn(5, 2)
    stopped(tmp_path / "run", act=lambda run: run.block(1, lambda: ({"x": x}, {"seconds": 0.1})))
    with Run(tmp_path / "run", "sample", {}) as run:
        assert run.resumed == 1
        tensors, notes = run.block(1, work(3, done))
        assert torch.equal(tensors["x"], x)
        assert notes == {"seconds": 0.1}
        run.block(0, work(2, done))
        assert done == [2]


@pytest.mark.parametrize("error", [FanalError("no"), RuntimeError("no")])
def test_an_error_before_the_first_block_leaves_nothing(tmp_path, error):
    stopped(tmp_path / "run", error=error, act=lambda run: run.path("calibration.json").write_text("{}"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [FanalError("no"), KeyboardInterrupt()])
def test_an_error_after_it_leaves_what_can_be_resumed(tmp_path, error):
    stopped(tmp_path / "run", error=error)
    assert [path.name for path in tmp_path.iterdir()] == [".run.part"]
    assert Run(tmp_path / "run", "sample", {}).resumed == 1


def test_a_stop_between_the_record_and_the_rename_can_be_resumed(tmp_path):
    stopped(tmp_path / "run", {"steps": 4}, act=lambda run: (run.block(0, work(1)), run.describe({"results": {}})))
    done = []
    with Run(tmp_path / "run", "sample", {"steps": 4}) as run:
        assert run.resumed == 1
        run.block(0, work(1, done))
        run.describe({"results": {}})
        run.finish()
    assert done == []
    assert record(tmp_path / "run")["config"] == {"steps": 4}


@pytest.mark.parametrize(
    ("command", "config", "words"),
    [
        ("sample", {"steps": 5, "model": {"name": "a"}}, "steps: 4 there, 5 here"),
        ("sample", {"steps": 4, "model": {"name": "b"}}, "name: 'a' there, 'b' here"),
        ("demo", {"steps": 4, "model": {"name": "a"}}, "command: 'sample' there, 'demo' here"),
    ],
)
def test_an_unfinished_run_with_other_settings_is_kept_and_named(tmp_path, command, config, words):
    out = tmp_path / "run"
    stopped(out, {"steps": 4, "model": {"name": "a"}})
    with pytest.raises(FanalError, match=words):
        Run(out, command, config)
    assert (part_of(out) / "block-000000.safetensors").is_file()
    assert Run(out, command, config, overwrite=True).resumed == 0
    assert not (part_of(out) / "block-000000.safetensors").exists()


def test_another_version_of_torch_does_not_mix_its_bits_in(tmp_path, monkeypatch):
    stopped(tmp_path / "run")
    monkeypatch.setattr("torch.__version__", "1.0.0")
    with pytest.raises(FanalError, match="torch: .* there, '1.0.0' here"):
        Run(tmp_path / "run", "sample", {})


def finished(out, value=1, **options):
    with Run(out, "sample", {}, **options) as run:
        run.path("x.json").write_text(json.dumps(value))
        run.describe({})
        run.finish()


def test_a_finished_run_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / "run"
    finished(out)
    with pytest.raises(FanalError, match="choose another --out or pass --overwrite; fanal report"):
        Run(out, "sample", {})
    finished(out, 2, overwrite=True)
    assert json.loads((out / "x.json").read_text()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_replaces_another_leaves_it_until_it_is_whole(tmp_path):
    out = tmp_path / "run"
    finished(out)
    with pytest.raises(FanalError, match="no such block"), Run(out, "sample", {}, overwrite=True):
        raise FanalError("no such block")
    assert json.loads((out / "x.json").read_text()) == 1


@pytest.mark.parametrize(
    "content",
    [
        {"thesis.txt": "years of work"},
        {"run.json": "not json"},
        {"run.json": "[]"},
        {"run.json": '{"somebody": "else"}', "data.bin": "x"},
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_never_touched(tmp_path, content, overwrite):
    out = tmp_path / "mine"
    out.mkdir()
    for name, text in content.items():
        (out / name).write_text(text)
    with pytest.raises(FanalError, match="is not a run folder; choose another --out"):
        Run(out, "sample", {}, overwrite=overwrite)
    assert {path.name: path.read_text() for path in out.iterdir()} == content
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_where_the_work_would_go_is_never_touched(tmp_path, overwrite):
    part = tmp_path / ".run.part"
    part.mkdir()
    (part / "thesis.txt").write_text("years of work")
    with pytest.raises(FanalError, match=r"\.run\.part is in the way"):
        Run(tmp_path / "run", "sample", {}, overwrite=overwrite)
    assert (part / "thesis.txt").read_text() == "years of work"


def test_what_a_kill_leaves_before_the_first_file_is_whole_is_no_obstacle(tmp_path):
    part = tmp_path / ".run.part"
    part.mkdir()
    (part / ".run.json.part4711").write_text("{")
    with Run(tmp_path / "run", "sample", {}) as run:
        assert run.resumed == 0
    assert not (part / ".run.json.part4711").exists()


def test_places_that_can_be_no_folder_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FanalError, match="cannot write"):
        Run(tmp_path / "file" / "run", "sample", {})
    for place in (tmp_path / "file", tmp_path / "link"):
        with pytest.raises(FanalError, match="is not a run folder"):
            Run(place, "sample", {})
    with pytest.raises(FanalError, match="cannot be a run folder"):
        Run("/", "sample", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_place_where_nothing_can_be_written_keeps_nothing(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(FanalError, match="No space left on device; try another --out or free some space"):
        Run(tmp_path / "run", "sample", {})
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_a_fine_place(tmp_path):
    (tmp_path / "run").mkdir()
    finished(tmp_path / "run")
    assert (tmp_path / "run" / "run.json").is_file()


def test_a_block_file_is_whole_or_not_there(tmp_path, monkeypatch):
    out = tmp_path / "run"
    kept = {}

    def stop(*arguments):
        raise KeyboardInterrupt

    def act(run):
        run.block(0, work(1))
        kept.update(read_tensors(part_of(out) / "block-000000.safetensors")[0])
        monkeypatch.setattr("os.replace", stop)  # the moment before the file gets its name
        run.block(1, work(2))

    stopped(out, act=act)
    monkeypatch.undo()
    assert sorted(path.name for path in part_of(out).iterdir()) == ["block-000000.safetensors", "run.json"]
    assert same(kept, read_tensors(part_of(out) / "block-000000.safetensors")[0])


def with_model(out, model, *, overwrite=False):
    return Run(out, "sample", {"steps": 4}, identity={"model": model}, overwrite=overwrite)


def test_another_model_under_the_same_name_is_not_mixed_in(tmp_path):
    with with_model(tmp_path / "run", "a") as run:  # left without finish, as after a stop
        run.block(0, work(1))
    with pytest.raises(FanalError, match="not what the unfinished run"):
        with_model(tmp_path / "run", "b")
    with with_model(tmp_path / "run", "a") as run:
        assert run.resumed == 1
    with with_model(tmp_path / "run", "b", overwrite=True) as run:
        assert run.resumed == 0


def test_two_processes_do_not_share_a_run(tmp_path):
    with Run(tmp_path / "run", "sample", {}), pytest.raises(FanalError, match="another process"):
        Run(tmp_path / "run", "sample", {})
    with Run(tmp_path / "run", "sample", {}):
        pass
    assert not list(tmp_path.glob(".run.lock"))


def test_what_came_to_the_place_meanwhile_is_never_deleted(tmp_path):
    out = tmp_path / "run"
    with Run(out, "sample", {}) as run:
        run.block(0, work(3))
        run.describe({})
        out.mkdir()
        (out / "mine.txt").write_text("mine")
        with pytest.raises(FanalError, match="not a run folder"):
            run.finish()
    assert (out / "mine.txt").read_text() == "mine"
    assert (tmp_path / ".run.part" / "run.json").is_file()
    (tmp_path / ".run.old").mkdir()
    (tmp_path / ".run.old" / "mine.txt").write_text("mine")
    (out / "mine.txt").unlink()
    with Run(out, "sample", {}) as run:
        run.block(0, work(3))
        run.describe({})
        run.finish()
    assert (tmp_path / ".run.old" / "mine.txt").read_text() == "mine"
