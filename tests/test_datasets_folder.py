"""Image folders: what is read, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fanal.datasets import get
from fanal.datasets.base import check_shape
from fanal.errors import FanalError


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


def flat(level, size=(8, 8), channels=3):
    return np.full((*size, channels) if channels > 1 else size, level, dtype=np.uint8)


def everything(dataset):
    parts = [dataset.data(split) for split in ("train", "held out")]
    labels = None if parts[0].labels is None else torch.cat([p.labels for p in parts])
    return torch.cat([p.x for p in parts]), labels


def test_values_channels_and_classes(tmp_path):
    for i in range(10):
        save(tmp_path / "cats" / f"{i}.png", flat(10 * i))
        save(tmp_path / "dogs" / "deep" / f"{i}.PNG", flat(10 * i + 105))
    (tmp_path / "notes.txt").write_text("not an image")
    dataset = get(f"folder:{tmp_path}")
    assert dataset.shape == (3, 8, 8)
    assert dataset.classes == ("cats", "dogs")
    assert dataset.verdicts == ()
    x, labels = everything(dataset)
    level = ((x + 1) * 127.5).round().long()
    assert (level == level[:, :1, :1, :1]).all()
    level = level[:, 0, 0, 0]
    assert sorted(level.tolist()) == [*range(0, 100, 10), *range(105, 205, 10)]
    assert torch.equal(labels, (level >= 105).long())
    held = dataset.data("held out")
    assert held.labels.bincount().tolist() == [2, 2]
    assert sorted(dataset.data("held out", seed=9).x[:, 0, 0, 0]) == sorted(held.x[:, 0, 0, 0])
    train = dataset.data("train", seed=5)
    assert torch.equal(dataset.data("train", 5, seed=5).x, train.x[:5])


def test_grey_only_if_all_are(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", flat(50 * i, channels=1))
    assert get(f"folder:{tmp_path}").shape == (1, 8, 8)
    save(tmp_path / "color.bmp", flat(7))
    dataset = get(f"folder:{tmp_path}")
    assert dataset.shape == (3, 8, 8)
    assert everything(dataset)[0].shape == (5, 3, 8, 8)
    assert dataset.data().labels is None


def test_sixteen_bits_keep_their_range(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", np.full((8, 8), 21845 * (i + 1), dtype=np.uint16))
    x, _ = everything(get(f"folder:{tmp_path}"))
    assert x.shape == (3, 1, 8, 8)
    assert sorted(x[:, 0, 0, 0].tolist()) == pytest.approx([-1 / 3, 1 / 3, 1.0], abs=1e-4)


def test_center_crop_and_resize(tmp_path):
    picture = flat(0, (16, 40), 1)
    picture[:, 12:28] = 255  # exactly the central square
    for i in range(2):
        save(tmp_path / f"{i}.png", picture)
    x, _ = everything(get(f"folder:{tmp_path}"))
    assert x.shape == (2, 1, 16, 16)
    assert (x == 1).all()
    x, _ = everything(get(f"folder:{tmp_path},size=5"))
    assert x.shape == (2, 1, 5, 5)
    assert (x == 1).all()


def test_photographs_are_turned_upright(tmp_path):
    picture = flat(0, (8, 8), 1)
    picture[:, :4] = 255  # the left half is white; orientation 6 turns the picture clockwise: the upper half
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(2):
        Image.fromarray(picture).save(tmp_path / f"{i}.png", exif=exif)
    x, _ = everything(get(f"folder:{tmp_path}"))
    assert (x[:, :, :4] == 1).all()
    assert (x[:, :, 4:] == -1).all()


def test_a_folder_name_may_hold_commas(tmp_path):
    save(tmp_path / "a,b" / "0.png", flat(1))
    save(tmp_path / "a,b" / "1.png", flat(1))
    assert get(f"folder:{tmp_path / 'a,b'}").shape == (3, 8, 8)


def test_an_unreadable_image_is_named(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    cut = tmp_path / "1.png"
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FanalError, match=r"1\.png"):
        everything(get(f"folder:{tmp_path}"))
    cut.write_bytes(b"not a png")
    with pytest.raises(FanalError, match=r"1\.png"):
        get(f"folder:{tmp_path}")


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    save(tmp_path / "0.png", flat(1, (40, 40)))
    for limit in (1000, 500):  # 1,600 pixels: above the limit, and above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(FanalError, match=r"0\.png is too large"):
            get(f"folder:{tmp_path}")


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(FanalError, match="no images"):
        get(f"folder:{tmp_path}")
    with pytest.raises(FanalError, match="names no folder"):
        get(f"folder:{tmp_path / 'missing'}")
    with pytest.raises(FanalError, match="names no folder"):
        get("folder:")
    save(tmp_path / "only.png", flat(1))
    for size in ("0", "5000", "big", "-3"):
        with pytest.raises(FanalError, match="size"):
            get(f"folder:{tmp_path},size={size}")
    dataset = get(f"folder:{tmp_path}")
    assert len(dataset.data().x) == 1
    with pytest.raises(FanalError, match="too few images"):
        dataset.data("held out")
    with pytest.raises(FanalError, match="only 1"):
        dataset.data(count=2)
    with pytest.raises(FanalError, match="no verifier"):
        dataset.verify(dataset.data().x)
    save(tmp_path / "sub" / "other.png", flat(1))
    with pytest.raises(FanalError, match="loose"):
        get(f"folder:{tmp_path}")


def test_sixteen_bits_are_rounded_not_cut(tmp_path):
    """A level of 16 bits becomes the nearest one of 8."""
    from fanal.datasets.decoding import decode

    Image.fromarray(np.full((4, 4), 257 * 99 + 200, dtype=np.uint16)).save(tmp_path / "deep.png")
    with open(tmp_path / "deep.png", "rb") as file:
        assert np.unique(decode(file, (1, 4, 4), np.dtype(np.uint8))).tolist() == [100]


def test_a_shape_that_differs_is_told_with_the_size_to_read_at(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", flat(10 * i, (16, 16)))
    source = get(f"folder:{tmp_path}")
    check_shape(source, (3, 16, 16), "net")
    with pytest.raises(FanalError, match=rf"shape \(3, 16, 16\), and net makes .*{tmp_path},size=8$"):
        check_shape(source, (3, 8, 8), "net")
    check_shape(get(f"folder:{tmp_path},size=8"), (3, 8, 8), "net")
    for other in ((1, 8, 8), (2,)):
        with pytest.raises(FanalError, match=r"net makes \([12],.*\)$"):
            check_shape(source, other, "net")
