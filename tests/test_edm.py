"""EDM checkpoints: read without running them, converted, used by every command; hostile files are refused."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

import fanal as package
from edm_corpus import corpus, executing, harmless
from edm_files import INDEX, TINY, EasyDict, content, dump, figures, official, reference, tiny_pickle, tiny_state
from fanal.adapters import describe_edm, load_edm
from fanal.adapters.edm import _KNOWN
from fanal.adapters.pickles import Source, read_pickle
from fanal.adapters.storages import read_tensor
from fanal.errors import FanalError
from fanal.loading import card, fingerprint
from fanal.nets import load_model
from hostile import guarded, mutated, refusals, watched
from toys import environment, fanal, record, refused, samples

ADM = {"img_resolution": 4, "img_channels": 1, "label_dim": 2, "model_type": "DhariwalUNet"}
ADM |= {"model_channels": 4, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
KINDS = [("EDMPrecond", TINY), ("VPPrecond", TINY), ("VEPrecond", TINY), ("iDDPMPrecond", ADM), ("EDMPrecond", ADM)]


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "small.pkl"
    path.write_bytes(tiny_pickle())
    return path


@pytest.mark.parametrize("name", INDEX)
def test_a_checkpoint_gives_the_official_outputs(tmp_path, name):
    tensors, about = figures(name), INDEX[name]
    path = tmp_path / "net.pkl"
    path.write_bytes(dump(content(official(tensors), about["class"], about["init"])))
    state = torch.get_rng_state()
    model = load_edm(path)
    assert torch.equal(torch.get_rng_state(), state)
    truth, _ = reference(name)
    x, sigmas = tensors["io.x"], tensors["io.sigma"]
    labels = tensors["io.labels"].argmax(1) if "io.labels" in tensors else None
    out = model(x, sigmas, labels)
    assert torch.equal(out, truth(x, sigmas, labels))
    for got, expected in zip(out, tensors["io.D"], strict=True):
        assert float((got - expected).abs().max() / expected.abs().max()) <= 1e-5
    if about["class"] in ("VEPrecond", "VPPrecond"):
        assert model.sigma_max == pytest.approx(about["sigma_max"], rel=1e-6)
    if about["class"] == "EDMPrecond":  # without a limit of its own
        assert (model.sigma_min, model.sigma_max) == (0.002, 80.0)
    assert describe_edm(path)["parameters"] == about["parameters"]
    assert model.classes == about["init"]["label_dim"]


@pytest.mark.parametrize(("kind", "init"), KINDS)
def test_conversion_changes_no_bit(tmp_path, kind, init):
    path = tmp_path / "net.pkl"
    path.write_bytes(tiny_pickle(kind, init))
    told = fanal("convert", path, tmp_path / "folder")
    assert told.exit_code == 0, told.output
    assert str(tmp_path / "folder") in told.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "net.pkl"]
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["model.json", "model.safetensors"]
    direct, folder = load_edm(path), load_model(tmp_path / "folder")
    x = package.noise(direct.shape, range(4), 3.0)
    for sigma in (direct.sigma_min, 0.5, 3.0, direct.sigma_max):
        for labels in (None, torch.tensor([0, 1, 2, 1])):
            assert torch.equal(direct(x, torch.tensor(sigma), labels), folder(x, torch.tensor(sigma), labels))
    for name in ("config", "shape", "sigma_min", "sigma_max", "classes", "preconditioning"):
        assert getattr(direct, name) == getattr(folder, name)
    about = json.loads((tmp_path / "folder" / "model.json").read_text())["card"]
    assert about["source"]["sha256"] == fingerprint(f"edm:{path}")
    assert about["source"]["file"] == "net.pkl"


def test_every_command_takes_both_forms(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fanal("convert", "small.pkl", "folder").exit_code == 0
    words = ("--count", 6, "--steps", 4, "--label", 1, "--solver", "heun")
    for spec, out in (("edm:small.pkl", "a"), ("./folder", "b")):
        told = fanal("sample", spec, *words, "--out", out)
        assert told.exit_code == 0, told.output
        told = fanal("models", "info", spec)
        assert told.exit_code == 0, told.output
        assert json.loads(told.stdout)["source"]["format"] == "EDM pickle"
    assert torch.equal(samples(tmp_path / "a")["x"], samples(tmp_path / "b")["x"])
    assert record(tmp_path / "a")["config"]["model"] == "edm:small.pkl"
    guarded = fanal("sample", "edm:small.pkl", "--count", 8, "--block", 4, "--steps", 4, "--guard", "renoise")
    assert guarded.exit_code == 0, guarded.output


def test_load_binds_labels_and_counts(checkpoint):
    spec = f"edm:{checkpoint}"
    bare, bound = package.load(spec), package.load(spec, labels=1, guidance=2.0)
    x, sigma = package.noise(bare.shape, range(3), 2.0), torch.tensor(2.0)
    labelled, free = bare(x, sigma, torch.ones(3, dtype=torch.long)), bare(x, sigma)
    assert not torch.allclose(labelled, free)
    torch.testing.assert_close(bound(x, sigma), free + 2 * (labelled - free))
    assert (bare.calls, bare.evaluations) == (2, 6)
    assert card(spec)["preconditioning"] == "edm"
    with pytest.raises(FanalError, match=r"\[0, 1\]"):
        package.load(spec, labels=2)


def test_a_place_that_is_taken_is_kept(tmp_path, checkpoint):
    out, original = tmp_path / "folder", checkpoint.read_bytes()
    assert fanal("convert", checkpoint, out).exit_code == 0
    before = (out / "model.json").read_bytes()
    other = tmp_path / "other.pkl"
    other.write_bytes(dump(content(tiny_state(seed=1))))
    assert refused(fanal("convert", other, out), "holds a model", "--overwrite")
    assert (out / "model.json").read_bytes() == before
    bad = tmp_path / "bad.pkl"
    bad.write_bytes(b"\x80\x04N.")
    assert refused(fanal("convert", bad, out, "--overwrite"), "bad.pkl")
    assert (out / "model.json").read_bytes() == before
    assert fanal("convert", other, out, "--overwrite").exit_code == 0
    x = package.noise((1, 4, 4), range(2), 1.0)
    assert torch.equal(load_model(out)(x, torch.tensor(1.0)), load_edm(other)(x, torch.tensor(1.0)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for place in ("mine", "small.pkl", "small.pkl/x"):
        for words in ((), ("--overwrite",)):
            assert refused(fanal("convert", checkpoint, tmp_path / place, *words), place.partition("/")[0])
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert checkpoint.read_bytes() == original
    assert not [p.name for p in tmp_path.rglob(".*")]


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.pkl", tmp_path):
        with pytest.raises(FanalError, match="cannot read"):
            load_edm(path)
    assert refused(fanal("sample", f"edm:{tmp_path / 'none.pkl'}"), "none.pkl")
    assert refused(fanal("convert", tmp_path / "none.pkl", tmp_path / "out"), "none.pkl")


def test_other_constants_than_the_published_ones_are_refused(tmp_path):
    for kind, init, name in (("VPPrecond", TINY, "beta_d"), ("iDDPMPrecond", ADM, "C_1"), ("iDDPMPrecond", ADM, "M")):
        what = content(tiny_state(kind, init), kind, init)
        what["ema"]._init_kwargs[name] = 500
        (tmp_path / "x.pkl").write_bytes(dump(what))
        with pytest.raises(FanalError, match=f"another {name} than"):
            load_edm(tmp_path / "x.pkl")


def test_arguments_by_place_are_read(tmp_path):
    what = content(tiny_state())
    words = {k: v for k, v in TINY.items() if k not in ("img_resolution", "img_channels", "label_dim")}
    what["ema"].__dict__.update(_init_args=(4, 1, 2, False, 0.01, 50.0, 0.7), _init_kwargs=words)
    (tmp_path / "x.pkl").write_bytes(dump(what))
    model = load_edm(tmp_path / "x.pkl")
    assert (model.sigma_min, model.sigma_max, model.sigma_data) == (0.01, 50.0, 0.7)


@pytest.mark.parametrize("protocol", [4, 5])
def test_other_spellings_of_numpy_and_other_protocols(tmp_path, protocol):
    raw = dump(content(tiny_state()), protocol)
    assert b"numpy._core.multiarray" in raw
    old = raw.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    (frame,) = struct.unpack("<Q", raw[3:11])
    old = old[:3] + struct.pack("<Q", frame - (len(raw) - len(old))) + old[11:]
    assert len(old) < len(raw)
    for i, file in enumerate((raw, old)):
        (tmp_path / f"{i}.pkl").write_bytes(file)
    x = package.noise((1, 4, 4), range(2), 1.0)
    a, b = (load_edm(tmp_path / f"{i}.pkl")(x, torch.tensor(1.0)) for i in range(2))
    assert torch.equal(a, b)


def test_the_corpus_is_live(tmp_path):
    """The fragments do run with Python's own unpickler; otherwise refusing them would show nothing."""
    canary = tmp_path / "canary"
    for name in ("exec in reduce", "eval on the stack", "os.system", "posix.system", "inst", "obj"):
        canary.unlink(missing_ok=True)
        pickle.loads(b"\x80\x04" + executing(canary)[name] + b".")
        assert canary.exists(), name


def test_hostile_files_are_refused_and_nothing_runs(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    files = corpus(tmp_path / "canary")
    names = {str(i): name for i, name in enumerate(files)}
    for i, raw in enumerate(files.values()):
        (folder / f"{i}.pkl").write_bytes(raw)
    for i, raw in enumerate(harmless().values()):
        (folder / f"harmless{i}.pkl").write_bytes(raw)
    told = guarded(folder, tiny_pickle(), "fanal.adapters", "load_edm")
    answers = {name.removesuffix(".pkl"): answer for name, answer in told["answers"].items()}
    assert len(files) >= 190
    assert {names[i]: a for i, a in answers.items() if i in names and a[0] != "refused"} == {}
    assert {i: a for i, a in answers.items() if i not in names and a[0] != "loaded"} == {}
    assert max(seconds for _, seconds in answers.values()) < 20
    assert told["events"] == []
    assert not (tmp_path / "canary").exists()


def test_every_truncation_is_refused(tmp_path, checkpoint):
    raw, path = tiny_pickle(), tmp_path / "cut.pkl"
    for end in [*range(0, 300), *range(300, len(raw), 131), *range(len(raw) - 40, len(raw))]:
        path.write_bytes(raw[:end])
        with pytest.raises(FanalError, match="cut"):
            load_edm(path)


def whole(path):
    assert all(bool(torch.isfinite(p).all()) for p in load_edm(path).parameters())


def fuzz(tmp_path, count, seed):
    """Read mutated checkpoints while one watches; the number that were refused."""
    source, path = random.Random(seed), tmp_path / "mutated.pkl"
    raws = [tiny_pickle(), tiny_pickle("VEPrecond", {**TINY, "label_dim": 0})]
    path.write_bytes(raws[0])
    whole(path)  # whatever is imported late is imported now
    return watched(lambda: refusals(whole, path, (mutated(source.choice(raws), source) for _ in range(count))))


def test_the_watch_can_fail():
    with pytest.raises(AssertionError):
        watched(lambda: exec("1"))


def test_mutated_checkpoints_load_or_are_refused(tmp_path):
    assert 500 < fuzz(tmp_path, 1500, 0) < 1500


def test_mutated_tensors_are_read_or_refused():
    """The same on the reader alone, with a pickle of one module: more mutations of what matters in less time."""
    source, good = random.Random(0), torch.arange(6.0).reshape(2, 3)
    root = {"net": torch.nn.ModuleDict(), "scale": np.sqrt(0.5), "dict": EasyDict(a=(1, [2.0, None, True]))}
    raw = dump(root | {"z": torch.nn.Parameter(good)})
    found, count = {"read": 0, "refused": 0}, 4000
    for i in range(count + 1):
        data = mutated(raw, source) if i else raw
        try:
            content = read_pickle(Source(io.BytesIO(data), 0, len(data)), _KNOWN)
            tensor = read_tensor(content["z"], io.BytesIO(data), (2, 3))
            assert tensor.shape == (2, 3)
            assert bool(torch.isfinite(tensor).all())
            found["read"] += 1
        except FanalError:
            found["refused"] += 1
        except (KeyError, TypeError):  # of content["z"]
            assert not isinstance(content, dict) or "z" not in content
        assert i or torch.equal(tensor, good)
    assert found["read"] > 0.01 * count
    assert found["refused"] > 0.2 * count


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_mutated_checkpoints_load_or_are_refused(tmp_path, seed):
    assert 1000 < fuzz(tmp_path, 4000, seed) < 4000


@pytest.mark.slow
def test_imagenet_size_loads_within_memory(tmp_path):
    init = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "DhariwalUNet"}
    path = tmp_path / "large.pkl"
    state = tiny_state("EDMPrecond", init)
    path.write_bytes(dump(content(state, "EDMPrecond", init)))
    count = sum(v.numel() for v in state.values())
    del state
    code = (
        "import resource, sys; from fanal.adapters import load_edm\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "load_edm(sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 1.2 * 4 * count


def test_keys_that_share_a_hash_are_refused():
    """Multiples of 2^61 − 1 all hash to 0, so that a dict of them takes quadratic time."""
    for what in ({2**61 - 1: 0}, {3}, {2**31}, {-(2**61) + 1}):
        data = pickle.dumps(what, protocol=4)
        source = Source(io.BytesIO(data), 0, len(data))
        if what == {3}:
            assert read_pickle(source, {}) == {3}
            continue
        with pytest.raises(FanalError, match="small whole number"):
            read_pickle(source, {})


def test_another_kind_of_file_is_told(tmp_path):
    path = tmp_path / "notes.pkl"
    path.write_text("these are notes, no network\n", encoding="utf-8")
    with pytest.raises(FanalError, match="another kind of file"):
        load_edm(path)
