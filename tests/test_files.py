"""A file is whole or not there."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from fanal import files
from fanal.errors import FanalError
from fanal.files import read_json, write_atomically, write_json, write_tensors


def test_an_exception_in_the_middle_leaves_the_old_content(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write(part):
        part.write_text("half of the n")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_atomically(target, write)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_killed_process_leaves_the_old_content(tmp_path):
    """The process ends without unwinding, half-way through the new content."""
    target = tmp_path / "a.txt"
    target.write_text("old")
    code = (
        "import os, sys; from pathlib import Path; from fanal.files import write_atomically\n"
        "def write(part):\n"
        "    part.write_text('half of the n'); os._exit(9)\n"
        "write_atomically(Path(sys.argv[1]), write)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)], check=False).returncode == 9
    assert target.read_text() == "old"


def test_a_full_disk_is_one_clear_error(tmp_path):
    def write(part):
        part.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(FanalError, match="No space left"):
        write_atomically(tmp_path / "new" / "a.txt", write)
    assert os.listdir(tmp_path / "new") == []


def test_the_rename_is_the_last_thing(tmp_path, monkeypatch):
    """The content is on disk (flushed) before the name appears, and the temporary name is in the same folder."""
    log = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (log.append("sync"), real_sync(fd))[1])
    monkeypatch.setattr(files.os, "replace", lambda a, b: (log.append((a, b)), real_replace(a, b))[1])
    write_atomically(tmp_path / "a.txt", lambda part: part.write_text("new") and None)
    assert log[0] == "sync"
    assert log[1][0].parent == tmp_path
    assert (tmp_path / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("I am no folder")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.json", tmp_path / "folder", tmp_path / ("n" * 300)):
        with pytest.raises(FanalError, match="cannot write"):
            write_json(path, {})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_json_round_trip(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"ü": "日本"}}
    write_json(tmp_path / "deep" / "er" / "a.json", value)
    got = read_json(tmp_path / "deep" / "er" / "a.json")
    assert got == value
    assert list(got) == ["b", "a"]


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", '{"a": ' + "[" * 100_000, '{"a": ' + "1" * 5000 + "}", "\udcff"])
def test_read_json_refuses(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FanalError, match="a.json"):
        read_json(path)


def test_read_json_refuses_a_large_or_missing_file(tmp_path):
    with pytest.raises(FanalError, match=r"cannot read .*none.json: No such file or directory$"):
        read_json(tmp_path / "none.json")
    with pytest.raises(FanalError, match=r"cannot read .*none.safetensors: there is no such file$"):
        files.read_tensors(tmp_path / "none.safetensors")
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(16 * 1024 * 1024 + 1)
    with pytest.raises(FanalError, match="larger than"):
        read_json(tmp_path / "large.json")
    assert json.loads("{}") == {}


def test_tensors_round_trip_bit_exactly(tmp_path):
    values = {"a": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))[:, ::2], "b": torch.arange(5)}
    values["c"] = torch.tensor([float("nan"), -0.0, 5e-324], dtype=torch.float64)
    write_tensors(tmp_path / "a.safetensors", values)
    got = load_file(tmp_path / "a.safetensors")
    for name, value in values.items():
        assert got[name].dtype == value.dtype
        assert got[name].numpy().tobytes() == value.contiguous().numpy().tobytes()


def test_a_failed_tensor_write_leaves_nothing(tmp_path, monkeypatch):
    def fails(tensors, path, header):
        with open(path, "wb") as file:
            file.write(b"half")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(files, "save_file", fails)
    with pytest.raises(FanalError, match="No space left"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(3)})
    assert os.listdir(tmp_path) == []
