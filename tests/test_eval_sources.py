"""What `fanal eval` reads: folders, zips, pictures of all kinds."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import evaluated
from evaluated import color, figures, packed, save
from fanal.errors import FanalError
from fanal.files import write_tensors
from fanal.metrics import open_samples
from toys import fanal

# Fixtures
elsewhere = evaluated.elsewhere
hands = evaluated.hands


# Sources


def test_a_folder_and_a_zip_of_pictures_are_the_tensor(tmp_path, hands):
    folder = save(tmp_path / "pictures", hands)
    packed(folder, tmp_path / "pictures.zip")
    write_tensors(tmp_path / "s.safetensors", {"x": hands})
    for source in ("pictures", "pictures.zip", "s.safetensors"):
        words = ("--real", "hands32", "--real-count", 80, "--metric", "fid,sw", "--block", 17, "--out", f"e-{source}")
        assert fanal("eval", source, *words).exit_code == 0
    first = figures(tmp_path / "e-pictures")
    assert first == figures(tmp_path / "e-pictures.zip") == figures(tmp_path / "e-s.safetensors")


def test_pictures_come_in_the_order_of_their_numbers(tmp_path):
    images = color(12)
    source = open_samples(str(save(tmp_path / "p", images)))
    assert source.names == tuple(str(i) for i in range(12))
    assert torch.equal(source.read(0, 12), images)
    assert torch.equal(open_samples("p", count=5).read(3, 99), images[3:5])


def test_gray_deep_turned_and_transparent_pictures_are_read(tmp_path):
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    folder = tmp_path / "p"
    folder.mkdir()
    Image.fromarray(gray).save(folder / "0.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(folder / "1.png")
    Image.fromarray(np.stack([gray, np.full_like(gray, 255)], 2), "LA").save(folder / "2.png")
    assert torch.equal(open_samples("p").read(0, 3), torch.from_numpy(np.stack([gray] * 3))[:, None])
    Image.fromarray(np.stack([gray] * 3, 2)).save(folder / "3.png")
    assert open_samples("p").read(0, 4).shape == (4, 3, 8, 8)
    wide = Image.fromarray(np.arange(32, dtype=np.uint8).reshape(4, 8))
    (tmp_path / "q").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(tmp_path / "q" / "0.png", exif=exif)
    upright = np.rot90(np.asarray(wide), -1)[2:6].copy()
    assert torch.equal(open_samples("q").read(0, 1)[0, 0], torch.from_numpy(upright))


def test_pictures_of_many_sizes_need_one(tmp_path):
    folder = save(tmp_path / "p", color(2, 20))
    Image.fromarray(color(1, 30)[0].permute(1, 2, 0).numpy()).crop((0, 0, 30, 22)).save(folder / "z.png")
    with pytest.raises(FanalError, match=r"differ in size .*--size N"):
        open_samples("p")
    found = open_samples("p", size=16).read(0, 3)
    assert found.shape == (3, 3, 16, 16)
    middle = Image.open(folder / "z.png").crop((4, 0, 26, 22)).resize((16, 16), Image.Resampling.LANCZOS)
    assert torch.equal(found[2], torch.from_numpy(np.array(middle)).permute(2, 0, 1))


def test_a_zip_that_lies_or_bursts_is_refused(tmp_path):
    def zipped(name, content):
        with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, content)

    zipped("a.png", b"no picture")
    with pytest.raises(FanalError, match=r"a\.png is no png, jpg"):
        open_samples("z.zip")
    zipped("__MACOSX/._a.png", b"x")
    with pytest.raises(FanalError, match="no images in"):
        open_samples("z.zip")
    zipped("a.png", b"\0" * 2**23)
    with pytest.raises(FanalError, match=r"a\.png is too large"):
        open_samples("z.zip")
    (tmp_path / "z.zip").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(FanalError, match="no whole zip file"):
        open_samples("z.zip")
