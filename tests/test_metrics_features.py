"""What makes features, and the files that keep their statistics; hostile files are refused."""

from __future__ import annotations

import hashlib
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fanal.datasets import get
from fanal.errors import FanalError
from fanal.files import read_json, read_tensors, write_tensors
from fanal.metrics import OwnFeatures, Pixels, TorchScript, as_bytes, extractor, fid, kid
from fanal.metrics.features import gray_images
from fanal.metrics.network import WEIGHTS, load_network


class Published(torch.nn.Module):
    """The calling contract of the published Inception: bytes in, `return_features` chooses."""

    def forward(
        self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        assert img.dtype == torch.uint8
        x = img.float()
        features = torch.cat([x.mean((2, 3)), x.amax((2, 3)), x.amin((2, 3))], 1)
        return features if return_features else features[:, :2]


class Plain(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((2, 3))


class Sick(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((2, 3)) / 0


class Flat(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean()


class Choosy(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().reshape(len(x), 3 * 7 * 7)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for kind in (Published, Plain, Sick, Flat, Choosy):
            torch.jit.script(kind()).save(str(folder / f"{kind.__name__.lower()}.pt"))
    return folder


def levels(n=5, c=3, side=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, c, side, side), dtype=torch.uint8, generator=generator)


# Bytes and gray images


def test_bytes_are_what_a_picture_file_would_hold():
    x = torch.linspace(-1.2, 1.2, 300).reshape(1, 1, 15, 20)
    wanted = [min(max(round((v + 1) * 127.5), 0), 255) for v in x.flatten().tolist()]
    assert as_bytes(x).flatten().tolist() == wanted
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(as_bytes(every.float() / 127.5 - 1), every)
    assert as_bytes(every) is every


def test_gray_is_pillows_gray_and_resizing_is_near_pillows():
    color = levels(3, side=32)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in color]
    gray = torch.stack([torch.from_numpy(np.array(p.convert("L"))) for p in pictures])
    assert (gray_images(color)[:, 0] * 127.5 + 127.5 - gray).abs().max() <= 0.51  # Pillow rounds
    small = [p.convert("L").resize((8, 12), Image.Resampling.BILINEAR) for p in pictures]
    ours = torch.nn.functional.interpolate(gray[:, None].float(), (12, 8), mode="bilinear", antialias=True)
    assert (ours[:, 0] - torch.stack([torch.from_numpy(np.array(p)) for p in small])).abs().max() <= 1.01
    assert gray_images(levels(2, side=77), 32).shape == (2, 1, 32, 32)


@pytest.mark.parametrize(
    ("x", "parts"),
    [
        (torch.zeros(4, 2), ["(4, 2)", "--features pixels"]),
        (torch.zeros(2, 4, 8, 8), ["(2, 4, 8, 8)"]),
        (torch.full((2, 1, 4, 4), torch.nan), ["image 0 of 2", "NaN"]),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), ["int64"]),
    ],
)
def test_what_is_no_image_is_refused(x, parts):
    with pytest.raises(FanalError) as error:
        OwnFeatures()(x)
    for part in parts:
        assert part in str(error.value)


# The package's own network


def test_the_embedded_network_is_the_cards_and_small():
    card = read_json(WEIGHTS.with_suffix(".json"))
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == card["sha256"] == OwnFeatures().sha256
    assert WEIGHTS.stat().st_size < 1e6
    net, _ = load_network()
    assert sum(weight.numel() for weight in net.parameters()) == card["parameters"]
    assert card["name"] == OwnFeatures.name
    assert card["training"]["cpu_seconds"] < 600
    assert card["held_out"]["kinds"]["value"] > 0.95


def test_features_are_always_the_same_and_do_not_depend_on_the_batch():
    x = get("hands32").data("held out", 40).x
    own = OwnFeatures()
    found = own(x)
    assert found.shape == (40, 64)
    assert torch.equal(found, OwnFeatures()(x))
    assert torch.equal(found, own(as_bytes(x)))
    alone = torch.cat([own(one[None]) for one in x])
    assert (alone - found).abs().max() < 1e-4 * found.abs().max()


@pytest.mark.parametrize("name", ["hands32", "shapes32"])
def test_own_fid_grows_with_the_share_of_broken_samples(name):
    """Each step is three standard errors or more, although the features of broken samples have long tails."""
    dataset, own = get(name), OwnFeatures()
    real, other = own(dataset.data("held out", 600).x), own(dataset.data("train", 600).x)
    kinds = list(dataset.broken_kinds)
    broken = own(torch.cat([dataset.broken(kind, 50) for kind in kinds]))
    broken = broken[torch.randperm(len(broken), generator=torch.Generator().manual_seed(0))]
    mixed = [fid(torch.cat([other[share:], broken[:share]]), real) for share in (0, 30, 120, 300)]
    for before, after in zip(mixed, mixed[1:], strict=False):
        assert after.value - before.value > 3 * math.hypot(before.se, after.se)
    floor, worse = kid(other, real), kid(torch.cat([other[300:], broken[:300]]), real)
    assert abs(floor.value) < 4 * floor.se
    assert worse.value > 5 * worse.se


def test_a_network_that_is_not_the_cards_is_refused(tmp_path):
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"net{suffix}").write_bytes(WEIGHTS.with_suffix(suffix).read_bytes())
    load_network(tmp_path / "net.safetensors")
    tensors, _ = read_tensors(WEIGHTS)
    write_tensors(tmp_path / "net.safetensors", {name: value + 1 for name, value in tensors.items()})
    with pytest.raises(FanalError, match="sha256 differs"):
        load_network(tmp_path / "net.safetensors")


# TorchScript


def test_the_published_contract_asks_for_features_of_bytes(scripts):
    net = extractor(f"inception:{scripts / 'published.pt'}")
    x = levels()
    wanted = torch.cat([x.float().mean((2, 3)), x.float().amax((2, 3)), x.float().amin((2, 3))], 1)
    assert torch.equal(net(x), wanted)
    assert net.name == "inception"
    assert net.sha256 == hashlib.sha256((scripts / "published.pt").read_bytes()).hexdigest()
    gray = levels(c=1)
    assert torch.equal(net(gray), net(gray.expand(-1, 3, -1, -1)))
    assert torch.equal(net(gray.float() / 127.5 - 1), net(gray))


def test_any_module_that_maps_images_to_rows_will_do(scripts):
    x = levels()
    assert torch.equal(TorchScript(scripts / "plain.pt")(x), x.float().mean((2, 3)))


def test_the_environment_names_inception(scripts, monkeypatch):
    monkeypatch.delenv("FANAL_INCEPTION", raising=False)
    with pytest.raises(FanalError, match="inception:PATH"):
        extractor("inception")
    monkeypatch.setenv("FANAL_INCEPTION", str(scripts / "published.pt"))
    assert extractor("inception").sha256 == TorchScript(scripts / "published.pt").sha256


def test_a_hub_file_comes_from_the_filled_cache(scripts, tmp_path, monkeypatch):
    from huggingface_hub import constants, file_download

    commit, folder = "0" * 40, tmp_path / "models--lab--nets"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "net.pt").write_bytes((scripts / "plain.pt").read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert file_download.constants is constants
    x = levels()
    assert torch.equal(extractor("torchscript:hub:lab/nets/net.pt")(x), x.float().mean((2, 3)))
    with pytest.raises(FanalError, match=r"cannot fetch other\.pt of hub:lab/nets"):
        extractor("torchscript:hub:lab/nets/other.pt")
    with pytest.raises(FanalError, match="hub:ORG/REPO/FILE"):
        extractor("torchscript:hub:lab/nets")


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("inception:{}/plain.pt", ["not the published Inception", "torchscript:PATH"]),
        ("torchscript:{}/none.pt", ["cannot read", "No such file"]),
        ("torchscript:{}/junk.pt", ["is no TorchScript file"]),
        ("torchscript:{}/pickle.pt", ["is no TorchScript file"]),
        ("torchscript:{}/sick.pt", ["returned NaN"]),
        ("torchscript:{}/flat.pt", ["must return features of shape (N, F), got ()"]),
        ("torchscript:{}/choosy.pt", ["failed on images of shape (5, 3, 16, 16)"]),
        ("onw", ["unknown features 'onw'", "did you mean 'own'"]),
        ("inception:", ["unknown features"]),
    ],
)
def test_a_network_that_does_not_work_is_refused_in_one_line(scripts, spec, parts):
    (scripts / "junk.pt").write_bytes(b"nothing" * 100)
    torch.save({"x": torch.zeros(3)}, scripts / "pickle.pt")
    with pytest.raises(FanalError) as error:
        extractor(spec.format(scripts))(levels())
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_pixels_are_the_samples():
    points = torch.randn(6, 2)
    assert torch.equal(Pixels()(points), points)
    image = levels(c=1, side=4)
    assert torch.equal(Pixels()(image), (image.float() / 127.5 - 1).flatten(1))
    assert torch.equal(Pixels()(image.float() / 127.5 - 1), Pixels()(image))
    assert Pixels()(torch.randn(3, 4, 8, 8)).shape == (3, 256)
