"""Each command of the recipes runs, on small files of the formats it names and with small counts."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import adm_files
import edm_files
import pipelines
from clips import make_clip
from fanal.labeling import open_labels, read_samples
from test_metrics_features import Published
from toys import fanal

pytest.importorskip("diffusers")

PAGES = sorted((Path(__file__).parent.parent / "docs" / "recipes").glob("*.md"))
BLOCK = re.compile(r"^```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
SIDE = 8

SMALLER = {
    "sample": {"--count": 4, "--block": 2, "--device": "cpu"},
    "guard": {"--count": 4, "--block": 2, "--device": "cpu"},
    "schedule": {"--warmup": 4, "--holdout": 4, "--teacher-steps": 12, "--batch": 4, "--device": "cpu"},
    "train": {"--iterations": 2, "--batch": 4, "--size": 16, "--evaluate": 8, "--device": "cpu"},
    "eval": {"--size": 16, "--count": 4},
    "geometry": {"--count": 4, "--points": 8, "--steps": 6, "--device": "cpu"},
    "models": {"--batch": 2, "--count": 4, "--device": "cpu"},
}
"""Values that replace those of a command, or join them where the command always has the option."""
JOIN = {"schedule": ("--holdout", "--teacher-steps"), "train": ("--evaluate",), "geometry": ("--steps",)}
SPEC = re.compile(r"^(adm|consistency):\S+\.pt$")
SETTINGS = {"adm": "order=legacy,schedule=linear", "consistency": "order=new"}  # published files say so by their shapes
LONGEST = 6  # intervals of a run


def edm(**more):
    init = edm_files.TINY | {"img_resolution": SIDE, "img_channels": 3, "label_dim": 0, **more}
    return lambda path: path.write_bytes(edm_files.tiny_pickle(init=init))


def adm(**more):
    return lambda path: adm_files.save(path, adm_files.state(classes=0, **more))


def inception(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Published()).save(str(path))


def moments(path):
    np.savez(path, mu=np.full(9, 100.0), sigma=np.eye(9))


def captions(path):
    rows = [{"image_id": i, "caption": f"a dog on the mat {i}"} for i in range(6)]
    path.write_text(json.dumps({"annotations": rows}), encoding="utf-8")


def images(path, shape=(20, 24, 3)):
    path.mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i:03d}.png")


FILES = {
    "edm-imagenet-64x64-cond-adm.pkl": edm(label_dim=210),
    "lsun_bedroom.pt": adm(outputs=6),
    "stable-diffusion-v1-5": lambda path: pipelines.make_sd().save_pretrained(path),
    "clip-vit-base-patch32": make_clip,
    "inception-2015-12-05.pt": inception,
    "captions_val2014.json": captions,
    "val2014": images,
    "CIFAR": lambda path: images(path, (SIDE, SIDE, 3)),
    "11k-hands": images,
}
ENDINGS = {".pkl": edm(), ".pt": adm(axes=2), ".npz": moments}
MADE = re.compile(r"(?:--out|--write-captions|--write-stats)[ =](\S+)")
NAMED = re.compile(r"[\w-]+\.(?:pkl|pt|npz)\b|\b(?:" + "|".join(map(re.escape, FILES)) + r")\b")


def commands(page):
    """The commands of a page, in order, whether it says `fanal` in a block marked as text."""
    lines = "".join(BLOCK.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("fanal ")]


def smaller(line):
    """The words of a command, with small counts and the settings that small checkpoints need."""
    words = shlex.split(line)[1:]
    kind, changes = words[0], SMALLER[words[0]]
    for i, word in enumerate(words[:-1]):
        if word in changes:
            words[i + 1] = str(changes[word])
        elif word == "--steps" and kind in ("sample", "guard") and "--schedule" not in words:
            words[i + 1] = str(min(int(words[i + 1]), LONGEST))
    for option in JOIN.get(kind, ()):
        if option not in words:
            words += [option, str(changes[option])]
    return [SPEC.sub(lambda m: f"{m[0]},size=8,heads=2,{SETTINGS[m[1]]}", word) for word in words]


def by_hand(folder):
    """Label every sample of a run, every second one wrong, as a person does on the page that the command serves."""
    labels = open_labels(read_samples(folder), "faces")
    for b in range(labels.count):
        labels.set(b, b % 2)


def test_the_recipes_are_all_here():
    assert {page.stem for page in PAGES} == {
        "index", "cifar10-ffhq", "imagenet-lsun", "stable-diffusion", "hallucinations", "trajectories"
    }  # fmt: skip
    assert sum(len(commands(page)) for page in PAGES) > 35


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_recipe_runs_from_its_first_command_to_its_last(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = commands(page)
    for name in sorted(set(NAMED.findall("\n".join(lines)))):
        place = tmp_path / name
        FILES.get(name, ENDINGS.get(place.suffix))(place)
    assert lines
    for line in lines:
        if line.startswith("fanal label "):
            by_hand(line.split()[2])
            continue
        told = fanal(*smaller(line))
        assert told.exit_code == 0, f"{line}\n{told.output}"
        for made in MADE.findall(line):
            assert (tmp_path / made).exists(), f"{line} made no {made}"
