"""The data sets: reproducible streams, and verifiers that pass what is real and catch what is broken."""

from __future__ import annotations

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage

from fanal import datasets
from fanal.datasets import DATASETS, Dataset, get, hands, polygons
from fanal.datasets.base import BLOCK
from fanal.datasets.regions import CHUNK, depth, label
from fanal.errors import FanalError

VERIFIED = [name for name, d in DATASETS.items() if d.verdicts]
IMAGES = ["shapes32", "hands32", "scenes64"]
FEWER = {"scenes64": 4}  # large images: a fourth of the samples, so that the tests stay quick
BROKEN = [(name, kind) for name in VERIFIED for kind in DATASETS[name].broken_kinds]


def noisy(x):
    return x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def blurred(x):
    return torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 0, 0.5, 0.5), mode="nearest"))


DAMAGE = {"clean": lambda x: x, "noisy": noisy, "blurred": blurred}


@functools.cache
def real(name, count, split="train"):
    return get(name).data(split, count)


def share_ok(name, x):
    return (get(name).verify(x) == 0).float().mean().item()


def share_right(name, kind, x):
    dataset = get(name)
    right = torch.tensor([dataset.verdicts.index(v) for v in dataset.broken_kinds[kind]])
    return torch.isin(dataset.verify(x), right).float().mean().item()


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATASETS)
def test_data_is_a_function_of_seed_split_and_index(name):
    dataset = get(name)
    for split, large in (("train", BLOCK + 100), ("held out", 200)):
        whole, part = dataset.data(split, large, seed=3), dataset.data(split, large - 90, seed=3)
        assert torch.equal(whole.x[: large - 90], part.x)
        assert torch.equal(dataset.data(split, large, seed=3).x, whole.x)
        assert not torch.equal(dataset.data(split, large, seed=4).x, whole.x)
        assert (whole.labels is None) == (not dataset.classes)
        if whole.labels is not None and part.labels is not None:
            assert torch.equal(whole.labels[: large - 90], part.labels)


@pytest.mark.parametrize("name", VERIFIED)
def test_blocks_and_splits_share_no_sample(name):
    dataset = get(name)
    parts = [dataset.data(s, 3 * BLOCK, seed).x for s in ("train", "held out") for seed in (0, 1)]
    rows = torch.cat(parts).flatten(1).numpy()
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_digits_are_partitioned_once_for_all_seeds():
    digits = get("digits8")
    rows = {
        (split, seed): {r.tobytes() for r in digits.data(split, seed=seed).x.numpy()}
        for split in ("train", "held_out")
        for seed in (0, 1)
    }
    assert rows["train", 0] == rows["train", 1]
    assert not rows["train", 0] & rows["held_out", 1]
    train, held = digits.data("train"), digits.data("held out")
    assert len(train.x) + len(held.x) == 1797
    for digit in range(10):
        counts = (train.labels == digit).sum().item(), (held.labels == digit).sum().item()
        assert counts[1] / sum(counts) == pytest.approx(0.2, abs=0.01)
    # The labels belong to the images: a nearest-neighbor classifier gets over 95 percent right (chance: 10).
    nearest = torch.cdist(held.x.flatten(1), train.x.flatten(1)).argmin(1)
    assert (train.labels[nearest] == held.labels).float().mean() > 0.95


@pytest.mark.parametrize("name", DATASETS)
def test_data_has_the_announced_form(name):
    dataset = get(name)
    data = dataset.data("held out", 100)
    assert isinstance(dataset, Dataset)
    assert data.x.dtype == torch.float32
    assert data.x.shape == (100, *dataset.shape)
    if len(dataset.shape) == 3:
        assert data.x.min() == -1
        assert 0.9 < data.x.max() <= 1
    if data.labels is not None:
        assert data.labels.dtype == torch.int64
        assert set(data.labels.tolist()) <= set(range(len(dataset.classes)))


def test_default_counts():
    for name, train, held in (("grid2", 100_000, 10_000), ("hands32", 20_000, 2_000), ("shapes32", 20_000, 2_000)):
        assert len(get(name).data().x) == train
        assert len(get(name).data("held out").x) == held


# --- distributions ---------------------------------------------------------------------------------------------------


def test_grid_has_the_stated_moments():
    x = real("grid2", 100_000).x
    seen = get("grid2").measure(x)
    counts = seen["mode"].bincount(minlength=25)
    # 4,000 expected in each mode with a standard deviation of 62: 5 of them.
    assert (counts - 4000).abs().max() < 5 * 62
    # Two coordinates of variance 0.01: mean of 1e5 squared distances 0.02 with a standard error of 6e-5.
    assert (seen["distance"] ** 2).mean().item() == pytest.approx(0.02, abs=3e-4)
    assert torch.allclose(x.mean(0), torch.zeros(2), atol=5 * 2.83 / 316)
    modes = torch.from_numpy(datasets.grid.modes()).float()
    brute = torch.cdist(x[:2000], modes).min(1)
    assert torch.equal(brute.indices, seen["mode"][:2000])


def test_shapes_come_in_all_sets_and_labels_name_what_is_there():
    data = real("shapes32", 4000)
    counts = data.labels.bincount(minlength=7)
    assert (counts - 4000 / 7).abs().max() < 5 * 22.2  # standard deviation of a count: 22.2
    seen = get("shapes32").measure(data.x)
    for shape in polygons.SHAPES:
        named = torch.tensor([shape in name.split("+") for name in get("shapes32").classes])
        assert torch.equal(seen[f"{shape}s"] == 1, named[data.labels])


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_real_points_pass():
    x = real("grid2", 100_000).x
    # exp(-12.5) = 3.7e-6 per point: 0.4 expected, more than 5 have a probability of 1e-5.
    assert (get("grid2").verify(x) != 0).sum() <= 5


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", IMAGES)
def test_real_images_pass(name, damage):
    assert share_ok(name, DAMAGE[damage](real(name, 4000 // FEWER.get(name, 1)).x)) >= 0.998


@pytest.mark.parametrize(("name", "kind"), BROKEN)
def test_broken_samples_get_the_right_verdict(name, kind):
    count = 400 // FEWER.get(name, 1)
    x = get(name).broken(kind, count)
    assert len(x) == count
    assert torch.equal(get(name).broken(kind, count // 4), x[: count // 4])
    for damage in DAMAGE if name in IMAGES else ["clean"]:
        assert share_right(name, kind, DAMAGE[damage](x)) >= 0.99, damage


@pytest.mark.parametrize("name", VERIFIED)
def test_every_verdict_has_a_broken_kind(name):
    dataset = get(name)
    assert {v for right in dataset.broken_kinds.values() for v in right} == set(dataset.verdicts[1:])


@pytest.mark.parametrize("name", VERIFIED)
def test_a_verdict_does_not_depend_on_the_batch(name):
    dataset = get(name)
    some = 40 // FEWER.get(name, 1)
    kinds = [dataset.broken(kind, some) for kind in dataset.broken_kinds]
    noise = torch.randn(some, *dataset.shape, generator=torch.Generator().manual_seed(0))
    x = torch.cat([dataset.data(count=CHUNK).x, *kinds, noise])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    codes, seen = dataset.verify(x), dataset.measure(x)
    for size in (1, 7, CHUNK + 1):
        chunks = x.split(size)[:60]
        end = sum(map(len, chunks))
        assert torch.equal(torch.cat([dataset.verify(c) for c in chunks]), codes[:end])
        parts = [dataset.measure(c) for c in chunks]
        for key, value in seen.items():
            assert torch.equal(torch.cat([part[key] for part in parts]), value[:end]), key


@pytest.mark.parametrize("name", VERIFIED)
def test_verifiers_take_extremes(name):
    dataset = get(name)
    shape = dataset.shape
    assert dataset.verify(torch.zeros(0, *shape)).shape == (0,)
    for value in (1.0, 1e30, -1e30):
        codes = dataset.verify(torch.full((2, *shape), value))
        assert codes.dtype == torch.int64
        assert (codes != 0).all()
    x = dataset.data(count=50).x
    assert torch.equal(dataset.verify(x.double()), dataset.verify(x))


# --- measures --------------------------------------------------------------------------------------------------------


def test_measured_hands_agree_with_what_was_drawn():
    rng = np.random.default_rng(0)
    for fingers in (3, 5, 6):
        parts = hands.draw(rng, 1000, fingers)
        seen = {k: v.double().numpy() for k, v in get("hands32").measure(hands.render(parts)).items()}
        assert (seen["fingers"] == fingers).all()
        assert (seen["parts"] == 1).all()
        # A disc of whole thirds of a pixel that fits into the palm is smaller than the palm, by less than one of them.
        assert -1 / 3 < (seen["palm_radius"] - parts.palm).mean() < 0
        assert np.corrcoef(seen["palm_radius"], parts.palm)[0, 1] > 0.75
        assert np.corrcoef(seen["palm_x"], parts.center[:, 0])[0, 1] > 0.95
        assert np.corrcoef(seen["palm_y"], parts.center[:, 1])[0, 1] > 0.95
        assert np.abs(seen["longest_tip"] - parts.tip.max(axis=1)).mean() < 0.4
        assert np.corrcoef(seen["shortest_tip"], parts.tip.min(axis=1))[0, 1] > 0.75
        assert np.corrcoef(seen["finger_length"], (parts.tip - parts.palm[:, None]).mean(axis=1))[0, 1] > 0.75
        gray = (hands.render(parts).double().numpy() + 1).sum(axis=(1, 2, 3)) / 2
        assert np.abs(seen["area"] / gray - 1).max() < 0.03


def test_fingers_that_are_absent_are_not_drawn():
    rng = np.random.default_rng(0)
    parts = hands.draw(rng, 500)
    gone = rng.random(parts.tip.shape) < 0.5
    parts.tip[gone] = np.nan
    seen = get("hands32").measure(hands.render(parts))["fingers"].numpy()
    assert (seen == 5 - gone.sum(axis=1)).mean() >= 0.99


def test_measured_shapes_agree_with_what_was_drawn():
    x = real("shapes32", 2000).x
    seen = get("shapes32").measure(x)
    gray = ((x + 1) / 2).sum(dim=(1, 2, 3))
    assert torch.allclose(seen["area"], gray, atol=0.05)
    assert seen["fit"].min() > 0.95
    assert seen["faint"].max() == 0
    double = get("shapes32").measure(get("shapes32").broken("duplicate", 400))
    assert (torch.stack([double[f"{s}s"] for s in polygons.SHAPES]).amax(0) == 2).float().mean() > 0.99
    moved = get("shapes32").measure(get("shapes32").broken("wrong column", 400))
    assert (moved["misplaced"] == 1).float().mean() > 0.99


def test_regions_are_those_of_single_pictures():
    rng = np.random.default_rng(0)
    mask = rng.random((30, 12, 17)) < 0.45
    mask[:, 0], mask[:, -1] = True, True  # neighbors in the stack would touch here
    regions, distances = label(mask), depth(mask)
    for i, single in enumerate(mask):
        expected, count = ndimage.label(single, structure=np.ones((3, 3)))
        mine = regions.index[i]
        assert len(np.unique(mine[mine > 0])) == count
        assert len({*zip(mine[single].tolist(), expected[single].tolist(), strict=True)}) == count
        assert (regions.owner[mine[single]] == i).all()
        assert np.array_equal(regions.area[mine[single]], np.bincount(expected.ravel())[expected[single]])
        framed = ndimage.distance_transform_edt(np.pad(single, 1))[1:-1, 1:-1]
        assert np.array_equal(distances[i], framed)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VERIFIED)
def test_bad_samples_are_refused(name):
    dataset = get(name)
    x = dataset.data(count=4).x
    wrong = {"shape": x[:, :1].squeeze(1), "NaN": x.clone(), "floating": x.long(), "tensor": x.numpy()}
    wrong["NaN"].view(4, -1)[2, 1] = torch.nan
    for word, bad in wrong.items():
        for look in (dataset.verify, dataset.measure):
            with pytest.raises(FanalError, match=word):
                look(bad)
    with pytest.raises(FanalError, match="sample 2 of 4"):
        dataset.verify(wrong["NaN"])


@pytest.mark.parametrize("name", DATASETS)
def test_bad_requests_are_refused(name):
    dataset = get(name)
    for count in (0, -1, 2.5, True):
        with pytest.raises(FanalError, match="whole number"):
            dataset.data(count=count)
    with pytest.raises(FanalError, match="unknown split 'test'"):
        dataset.data("test")
    for seed in (-1, 0.5):
        with pytest.raises(FanalError, match="seed"):
            dataset.data(count=1, seed=seed)
    if dataset.verdicts:
        with pytest.raises(FanalError, match="unknown kind of broken sample"):
            dataset.broken("nonesuch", 1)
        with pytest.raises(FanalError, match="whole number"):
            dataset.broken(next(iter(dataset.broken_kinds)), 0)
    else:
        for ask in (lambda: dataset.verify(None), lambda: dataset.measure(None), lambda: dataset.broken("", 1)):
            with pytest.raises(FanalError, match="no verifier"):
                ask()


def test_unknown_and_exhausted_sets():
    with pytest.raises(FanalError, match="did you mean 'hands32'"):
        get("hands")
    with pytest.raises(FanalError, match="only 1438"):
        get("digits8").data(count=1439)


def test_importing_needs_no_heavy_package():
    code = "import sys, fanal.datasets; print([m for m in ('sklearn', 'torchvision', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
