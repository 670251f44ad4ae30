"""Images in zip files, labels in dataset.json, unusable images: what is read, what is refused, what is named."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fanal.datasets import get
from fanal.datasets.folder import Folder
from fanal.datasets.levels import Levels, levels_of
from fanal.datasets.sources import Archive, json_labels
from fanal.errors import FanalError


def png(level, size=8, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (size, size), level if mode in ("L", "I;16") else (level,) * len(mode)).save(file, format="PNG")
    return file.getvalue()


def pack(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def unpack(path, folder):
    with zipfile.ZipFile(path) as file:
        file.extractall(folder)
    return folder


def everything(dataset):
    parts = [dataset.data(split) for split in ("train", "held out")]
    labels = None if parts[0].labels is None else torch.cat([p.labels for p in parts])
    return torch.cat([p.x for p in parts]), labels


CLASSES = {f"{kind}/{i}.png": png(10 * i + start) for kind, start in (("cats", 0), ("dogs", 105)) for i in range(10)}


def test_a_zip_file_is_read_as_the_folder_it_was_packed_from(tmp_path):
    path = pack(tmp_path / "pets.zip", {**CLASSES, "notes.txt": "not an image"})
    packed, unpacked = get(f"folder:{path}"), get(f"folder:{unpack(path, tmp_path / 'pets')}")
    assert packed.classes == unpacked.classes == ("cats", "dogs")
    assert packed.files == unpacked.files
    for split in ("train", "held out"):
        a, b = packed.data(split), unpacked.data(split)
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.labels, b.labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pets", "pets.zip"]  # nothing was extracted


def test_the_folder_above_everything_is_no_class(tmp_path):
    path = pack(tmp_path / "a.zip", {f"my photos/{name}": content for name, content in CLASSES.items()})
    assert get(f"folder:{path}").classes == ("cats", "dogs")
    path = pack(tmp_path / "b.zip", {f"my photos/2024/{i}.png": png(i) for i in range(4)})
    assert get(f"folder:{path}").classes == ()


def test_hidden_files_are_no_images(tmp_path):
    junk = {"__MACOSX/cats/._0.png": "x", "cats/.0.png": "x", ".trash/0.png": "x"}
    path = pack(tmp_path / "a.zip", {**CLASSES, **junk})
    assert len(get(f"folder:{path}").files) == 20
    assert len(get(f"folder:{unpack(path, tmp_path / 'a')}").files) == 20


@pytest.mark.parametrize("packed", [True, False])
def test_labels_of_dataset_json(tmp_path, packed):
    members = {f"0000{i % 2}/img{i}.png": png(20 * i) for i in range(10)}
    labels = [[name, int(name[-5]) % 3] for name in members]
    path = pack(tmp_path / "a.zip", {**members, "dataset.json": json.dumps({"labels": [*labels, ["gone.png", 7]]})})
    path = path if packed else unpack(path, tmp_path / "a")
    dataset = get(f"folder:{path}")
    assert dataset.classes == ("0", "1", "2")
    x, found = everything(dataset)
    level = ((x[:, 0, 0, 0] + 1) * 127.5 / 20).round().long()
    assert torch.equal(found, level % 3)
    none = pack(tmp_path / "b.zip", {**members, "dataset.json": '{"labels": null}'})
    assert get(f"folder:{none}").classes == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not"),
        ("[]", "not"),
        ("{}", "not"),
        ("[" * 100_000, "not"),
        ('{"labels": 3}', "each label"),
        ('{"labels": {"a.png": 1}}', "each label"),
        ('{"labels": [["a.png"]]}', "each label"),
        ('{"labels": [["a.png", 1.0]]}', "each label"),
        ('{"labels": [["a.png", true]]}', "each label"),
        ('{"labels": [["a.png", -1]]}', "each label"),
        ('{"labels": [["a.png", 65536]]}', "each label"),
        ('{"labels": [["a.png", [0.5, 1.0]]]}', "each label"),
        ('{"labels": [[3, 3]]}', "each label"),
        ('{"labels": [["a.png", 0]]}', r"no label for 1 of 2 images; the first is b\.png"),
    ],
)
def test_wrong_labels_are_refused(tmp_path, content, words):
    path = pack(tmp_path / "a.zip", {"a.png": png(1), "b.png": png(2), "dataset.json": content})
    with pytest.raises(FanalError, match=words):
        get(f"folder:{path}")


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda s: st.lists(s, max_size=3), max_leaves=8))
def test_no_json_gets_past_the_check(value):
    try:
        classes, labels = json_labels(json.dumps({"labels": value}).encode(), ("a", "b"), "here")
    except FanalError:
        return
    assert (classes, labels) == ((), {}) or all(0 <= labels[name] < len(classes) for name in ("a", "b"))


# Zip files from anywhere


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "C:/evil.png", "..\\evil.png"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    path = pack(tmp_path / "a.zip", {"good.png": png(1), name: png(2)})
    with pytest.raises(FanalError, match="lead out"):
        get(f"folder:{path}")


def test_links_and_doubles_are_refused(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(FanalError, match="lead out"):
        get(f"folder:{tmp_path / 'a.zip'}")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.writestr("a.png", png(1))
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("a.png", png(2))
    with pytest.raises(FanalError, match="twice"):
        get(f"folder:{tmp_path / 'b.zip'}")


def test_a_truncated_zip_file_is_refused_wherever_it_ends(tmp_path):
    path = pack(tmp_path / "a.zip", {f"{i}.png": png(i) for i in range(6)})
    whole = path.read_bytes()
    for end in [*range(0, len(whole), 61), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(FanalError, match="no whole zip file"):
            get(f"folder:{path}")


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=8))
def test_a_damaged_zip_file_gives_its_images_or_an_error(tmp_path_factory, place, content):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "damaged.zip"
    pack(path, {f"{i}.png": png(40 * i) for i in range(4)})
    data = bytearray(path.read_bytes())
    place %= len(data)
    data[place : place + len(content)] = content[: len(data) - place]
    path.write_bytes(data)
    try:
        x, _ = everything(get(f"folder:{path},size=8"))
    except FanalError:
        return
    assert torch.equal(x, x.clamp(-1, 1))


def test_bombs_are_named_not_unpacked(tmp_path):
    path = pack(tmp_path / "a.zip", {"bomb.png": bytes(50 * 2**20), "good.png": png(1)})
    assert path.stat().st_size < 2**17
    with pytest.raises(FanalError, match=r"bomb\.png is too large: 52428800 bytes were packed into"):
        get(f"folder:{path}")
    # One that states a small size, and unpacks to more.
    data = path.read_bytes().replace(struct.pack("<L", 50 * 2**20), struct.pack("<L", 999))
    path.write_bytes(data)
    with pytest.raises(FanalError, match=r"bomb\.png is damaged in the zip file"):
        get(f"folder:{path}")


def test_uncommon_and_encrypted_members_are_named(tmp_path):
    path = pack(tmp_path / "a.zip", {"a.png": png(1)}, zipfile.ZIP_LZMA)
    with pytest.raises(FanalError, match=r"a\.png is packed in an uncommon way"):
        get(f"folder:{path}")
    data = bytearray(pack(tmp_path / "b.zip", {"a.png": png(1)}).read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "b.zip").write_bytes(data)
    with pytest.raises(FanalError, match=r"a\.png is encrypted"):
        get(f"folder:{tmp_path / 'b.zip'}")


def test_members_larger_than_any_image_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("fanal.datasets.sources._MEMBER_BYTES", 50)
    path = pack(tmp_path / "a.zip", {"a.png": png(1)})
    with pytest.raises(FanalError, match=r"a\.png is too large"):
        get(f"folder:{path}")


def test_other_files_are_no_zip_files(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"ustar" * 100)
    with pytest.raises(FanalError, match="no whole zip file"):
        get(f"folder:{tmp_path / 'a.tar'}")
    with pytest.raises(FanalError, match="no images"):
        get(f"folder:{pack(tmp_path / 'a.zip', {'a.txt': 'x'})}")
    with pytest.raises(FanalError, match="no images"):
        get(f"folder:{pack(tmp_path / 'b.zip', {})}")


# Unusable images


def spoil(folder):
    """Images that cannot be used, and what is said of each."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format="PNG")
    (folder / "cut.png").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    gif = io.BytesIO()
    Image.fromarray(noise).save(gif, format="GIF")
    (folder / "other.png").write_bytes(gif.getvalue())
    Image.new("L", (300, 300)).save(folder / "wide.png")
    return {
        "cut.png": "damaged or cut short",
        "empty.jpg": "is no png, jpg, webp or bmp image",
        "text.png": "is no png, jpg, webp or bmp image",
        "other.png": "is no png, jpg, webp or bmp image",
        "wide.png": "is too large",
    }


@pytest.fixture
def spoiled(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(10):
        (folder / f"good{i}.png").write_bytes(png(20 * i, 32))
    return folder, spoil(folder)


@pytest.mark.parametrize("packed", [False, True])
def test_every_unusable_image_is_named(spoiled, packed):
    folder, reasons = spoiled
    if packed:
        shutil.make_archive(str(folder), "zip", folder)
        folder = folder.with_suffix(".zip")
    with pytest.raises(FanalError) as caught:
        get(f"folder:{folder}").load()
    lines = str(caught.value).splitlines()
    assert lines[0] == f"5 of 15 images of folder:{folder} cannot be used:"
    for name, reason in reasons.items():
        assert any(line.startswith(f"  {name} ") and reason in line for line in lines), (name, lines)
    assert "--skip-bad" in lines[-1]


def test_twenty_are_named_and_the_rest_counted(tmp_path):
    for i in range(27):
        (tmp_path / f"{i:02d}.png").write_bytes(b"no")
    (tmp_path / "good.png").write_bytes(png(1))
    with pytest.raises(FanalError) as caught:
        get(f"folder:{tmp_path}")
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines[1:21]] == [f"{i:02d}.png" for i in range(20)]
    assert lines[21] == "  and 7 more"


def test_unusable_images_can_be_skipped(spoiled):
    folder, reasons = spoiled
    dataset = get(f"folder:{folder},size=32,bad=skip")
    assert {bad.name: bad.reason for bad in dataset.skipped}.keys() == reasons.keys()
    assert len(dataset.files) == len(dataset.labels) == 10
    x, _ = everything(dataset)
    assert sorted(((x[:, 0, 0, 0] + 1) * 127.5).round().tolist()) == [20.0 * i for i in range(10)]
    for good in folder.glob("good*"):
        good.unlink()
    with pytest.raises(FanalError, match="5 of 5 images"):
        get(f"folder:{folder},bad=skip")


def test_specs_with_unknown_options_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    with pytest.raises(FanalError, match="unknown way to treat bad images 'keep'"):
        get(f"folder:{tmp_path},bad=keep")
    with pytest.raises(FanalError, match="twice"):
        get(f"folder:{tmp_path},size=8,size=9")
    assert get(f"folder:{tmp_path},bad=skip,size=8").shape == get(f"folder:{tmp_path},size=8,bad=skip").shape


def test_a_color_mode_without_a_meaning_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(1))
    monkeypatch.setattr("fanal.datasets.decoding._COLOR", {"RGBA"})
    with pytest.raises(FanalError, match=r"a\.png has the color mode RGB"):
        get(f"folder:{tmp_path}")


# Levels


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_levels_are_the_floats_that_data_returns(tmp_path, mode):
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(png(20 * i if mode != "I;16" else 6000 * i, 8, mode))
    dataset = get(f"folder:{tmp_path}")
    for each in (dataset, dataset.load()):
        levels, data = each.levels("train"), each.data("train")
        assert levels.values.dtype == (np.uint16 if mode == "I;16" else np.uint8)
        assert torch.equal(levels.take(torch.arange(len(levels))), data.x)
        assert levels.std() == pytest.approx(float(data.x.double().std()), rel=1e-6)
        assert levels.crc() == levels_of(each, "train").crc()
        assert torch.equal(levels.take(torch.tensor([3, 3, 0])), data.x[[3, 3, 0]])
    more = dataset.load()
    assert more.load() is more


@given(st.integers(1, 60), st.integers(0, 2**32))
def test_the_deviation_of_levels_is_that_of_their_floats(count, seed):
    values = np.random.default_rng(seed).integers(0, 256, (count, 2, 3), dtype=np.uint8)
    levels = Levels(values)
    assert levels.std() == pytest.approx(float(levels.take(slice(None)).double().std()), rel=1e-6)


def test_sets_that_do_not_fit_into_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(1))
    monkeypatch.setattr("fanal.datasets.folder._SHARE", 1e-12)
    with pytest.raises(FanalError, match="choose a smaller size"):
        get(f"folder:{tmp_path}").load()


def test_the_smallest_side_can_decide_the_size(tmp_path):
    for i, side in enumerate((40, 20, 30)):
        (tmp_path / f"{i}.png").write_bytes(png(1, side))
    sides = []
    dataset = Folder.open(f"folder:{tmp_path}", side=lambda smallest: sides.append(smallest) or 16)
    assert (sides, dataset.shape, dataset.name) == ([20], (3, 16, 16), f"folder:{tmp_path},size=16")
    assert get(dataset.name).shape == (3, 16, 16)
    assert get(f"folder:{tmp_path}").shape == (3, 40, 40)


def test_an_archive_is_a_source(tmp_path):
    archive = Archive(pack(tmp_path / "a.zip", {"b/1.png": png(1), "b/0.png": png(2), "a.png": png(3)}))
    assert archive.names == ("a.png", "b/0.png", "b/1.png")
    assert archive.label_file is None
    with archive.open("b/1.png") as stream:
        assert stream.read() == png(1)
