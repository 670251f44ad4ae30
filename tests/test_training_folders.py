"""Folders of training: what is there is kept, continued or refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fanal.errors import FanalError
from fanal.nets import read_card
from fanal.objectives import Middle
from fanal.optimization import TrainingState
from fanal.training import _Sitting, train
from points import TINY, Points, interrupted, log, weights
from toys import same


def test_another_recipe_cannot_continue_and_the_difference_is_named(tmp_path):
    interrupted(TINY, tmp_path, Points(), at=5)
    with pytest.raises(FanalError, match=r"batch was 16, is 8; learning_rate was 0\.0015, is 0\.1\."):
        train(dataclasses.replace(TINY, batch=8, learning_rate=0.1), tmp_path, dataset=Points())
    with pytest.raises(FanalError, match=r"noise_levels was .*lognormal.*, is .*middle"):
        train(dataclasses.replace(TINY, noise_levels=Middle()), tmp_path, dataset=Points())
    for content in (b"", b"pickle", (tmp_path / "checkpoint.safetensors").read_bytes()[:-5]):
        (tmp_path / "checkpoint.safetensors").write_bytes(content)
        with pytest.raises(FanalError, match=r"checkpoint\.safetensors"):
            train(TINY, tmp_path, dataset=Points())


def test_a_finished_folder_is_left_alone_unless_told(tmp_path):
    train(TINY, tmp_path, dataset=Points())
    before = weights(tmp_path)
    with pytest.raises(FanalError, match="finished"):
        train(dataclasses.replace(TINY, seed=1), tmp_path, dataset=Points())
    assert same(before, weights(tmp_path))
    train(dataclasses.replace(TINY, seed=1), tmp_path, dataset=Points(), overwrite=True)
    assert not same(before, weights(tmp_path))
    assert len(log(tmp_path)) == 1


def test_only_what_training_wrote_is_ever_removed(tmp_path):
    recipe = dataclasses.replace(TINY, iterations=10)
    folder = tmp_path / "run"
    train(recipe, folder, dataset=Points())
    for name in (".big.iso.part", "notes.txt", "samples/mine.png"):
        (folder / name).write_text("mine")
    train(recipe, folder, dataset=Points(), overwrite=True)
    assert {p.name for p in folder.iterdir()} >= {".big.iso.part", "notes.txt", "model.json"}
    assert (folder / "samples" / "mine.png").read_text() == "mine"


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "photo.png").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FanalError, match="other files"):
            train(TINY, tmp_path, dataset=Points(), overwrite=overwrite)
    (tmp_path / "model.json").write_text('{"format": "another tool"}')
    with pytest.raises(FanalError, match="fanal-model-1"):
        train(TINY, tmp_path, dataset=Points(), overwrite=True)
    assert (tmp_path / "photo.png").read_text() == "mine"


def stopped(recipe, folder, dataset):
    """Leave a checkpoint, as a stopped run does."""
    sitting = _Sitting(TrainingState.start(recipe, dataset, None, torch.device("cpu")), folder)
    folder.mkdir()
    sitting.run.step()
    sitting.checkpoint()


def test_a_resumed_run_refuses_other_data(tmp_path):
    class Doubled(Points):
        def data(self, split="train", count=None, seed=0):
            data = super().data(split, count, seed)
            return dataclasses.replace(data, x=2 * data.x)

    stopped(TINY, tmp_path / "run", Points())
    with pytest.raises(FanalError, match="other samples"):
        train(TINY, tmp_path / "run", dataset=Doubled())


def test_overwrite_discards_an_unfinished_run(tmp_path):
    stopped(TINY, tmp_path / "run", Points())
    other = dataclasses.replace(TINY, iterations=12)
    with pytest.raises(FanalError, match="overwrite"):
        train(other, tmp_path / "run", dataset=Points())
    train(other, tmp_path / "run", dataset=Points(), overwrite=True)
    assert read_card(tmp_path / "run")["iterations"] == 12
