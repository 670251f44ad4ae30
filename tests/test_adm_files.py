"""Files of guided-diffusion and consistency models: published settings, and hostile files refused."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch

from adm_corpus import corpus, saved, small, with_pickle
from adm_files import SETTINGS, save, shapes, state
from edm_corpus import executing
from fanal.adapters import describe_adm, load_adm
from fanal.errors import FanalError
from hostile import guarded, mutated, refusals, watched
from toys import environment, fanal, refused

_64 = {"base": 192, "mults": (1, 2, 3, 4), "blocks": 3, "attends": (1, 2, 3), "classes": 1000}
PUBLISHED = {  # the files' names, what is in them, the width of image, and millions of parameters as published
    "adm:64x64_diffusion": (_64 | {"outputs": 6}, 64, 296),
    "adm:128x128_diffusion": (
        dict(base=256, mults=(1, 1, 2, 3, 4), blocks=2, attends=(2, 3, 4), classes=1000, outputs=6), 128, 422),
    "adm:256x256_diffusion": (
        dict(base=256, mults=(1, 1, 2, 2, 4, 4), blocks=2, attends=(3, 4, 5), classes=1000, outputs=6), 256, 554),
    "adm:256x256_diffusion_uncond": (
        dict(base=256, mults=(1, 1, 2, 2, 4, 4), blocks=2, attends=(3, 4, 5), outputs=6), 256, 552.8),
    "adm:512x512_diffusion": (
        dict(base=256, mults=(0.5, 1, 1, 2, 2, 4, 4), blocks=2, attends=(4, 5, 6), classes=1000, outputs=6), 512, 559),
    "consistency:edm_imagenet64_ema": (_64 | {"axes": 2}, 64, 296),
    "consistency:ct_cat256": (
        dict(base=256, mults=(1, 1, 2, 2, 4, 4), blocks=2, attends=(3, 4, 5), scale_shift=False, axes=2), 256, 527),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_found(tmp_path, name):
    """From the shapes alone: the tensors of these files share one value each."""
    sizes, side, millions = PUBLISHED[name]
    kind, _, file = name.partition(":")
    save(tmp_path / f"{file}.pt", {key: torch.zeros(1).expand(shape) for key, shape in shapes(**sizes).items()})
    about = describe_adm(f"{kind}:{tmp_path / file}.pt")
    assert abs(about["parameters"] / 1e6 - millions) < 1
    assert about["settings"]["size"] == side
    assert about["network"]["attn_resolutions"] == [32, 16, 8]
    assert about["network"]["channel_mult"] == list(sizes["mults"])
    assert about["network"]["scale_shift"] is sizes.get("scale_shift", True)
    assert about["network"]["learned_variance"] is (sizes.get("outputs") == 6)
    assert about["classes"] == sizes.get("classes", 0)
    heads = (4, 64) if "128" in name else (0, 64)
    assert (about["network"]["heads"], about["network"]["head_channels"]) == heads
    order = "new" if kind == "consistency" or "64x64" in name else "legacy"
    assert about["settings"]["order"] == order
    kinds = {"64x64_diffusion": "ddpm_cosine", "edm_imagenet64_ema": "edm1000", "ct_cat256": "consistency"}
    assert about["preconditioning"] == kinds.get(file, "ddpm_linear")
    assert about["published"] == sorted(about["settings"])
    with pytest.raises(FanalError, match="share memory"):
        load_adm(f"{kind}:{tmp_path / file}.pt")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "size"),
        ("size=8", "heads"),
        ("size=8,heads=2", "order"),
        ("size=8,heads=2,order=new", "schedule"),
        ("size=8,heads=2,order=old,schedule=linear", "legacy, new"),
        ("size=8,heads=2,order=new,schedule=cos", "cosine"),
        ("size=8,heads=two", "heads"),
        ("size=0", "size"),
        ("size=99999999999", "size"),
        ("size=9,heads=2,order=new,schedule=linear", "divisible"),
        ("size=8,heads=3,order=new,schedule=linear", "split"),
        ("size=8,heads=2,head_channels=32,order=new,schedule=linear", "one of them"),
        ("model=edm", "model"),
        ("heads=2,heads=2", "twice"),
        ("head=2", "did you mean 'heads'"),
    ],
)
def test_settings_are_asked_for_and_checked(tmp_path, words, said):
    path = save(tmp_path / "a.pt", state(attends=(0, 1), mults=(1, 2, 2)) if not words else state())
    with pytest.raises(FanalError, match=said):
        load_adm(f"adm:{path},{words}".removesuffix(","))
    with pytest.raises(FanalError):
        load_adm("adm:")


def test_which_consistency_file_it_is_comes_from_its_name_or_the_spec(tmp_path):
    for name, kind in (("edm_x.pt", "edm1000"), ("cd_x.pt", "consistency"), ("ct_x.pt", "consistency")):
        path = save(tmp_path / name, state(axes=2))
        assert load_adm(f"consistency:{path},heads=2,order=new,size=8").preconditioning == kind
    path = save(tmp_path / "mine.pt", state(axes=2))
    with pytest.raises(FanalError, match="model \\(consistency or edm\\)"):
        load_adm(f"consistency:{path},heads=2,order=new,size=8")
    assert refused(fanal("convert", path, tmp_path / "out"), "adm:", "consistency:")


FORM = f"adm:{{}},{SETTINGS}"


def test_the_corpus_is_live(tmp_path):
    """Its fragments do run where they are unpickled without care."""
    canary = tmp_path / "canary"
    for name, fragment in executing(canary).items():
        if name in ("exec in reduce", "os.system", "eval on the stack", "inst", "obj"):
            (tmp_path / "a.pt").write_bytes(with_pickle(b"\x80\x02" + fragment + b"."))
            torch.load(tmp_path / "a.pt", weights_only=False)
            assert canary.exists(), name
            canary.unlink()


def test_hostile_files_are_refused_and_nothing_runs(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    files = corpus(tmp_path / "canary")
    names = {f"{i}.pt": name for i, name in enumerate(files)}
    for name, raw in zip(names, files.values(), strict=True):
        (folder / name).write_bytes(raw)
    told = guarded(folder, small(), "fanal.adapters", "load_adm", FORM)
    answers = told["answers"]
    assert answers.pop("good")[0] == "loaded"
    assert len(files) >= 180
    assert {names[i]: a for i, a in answers.items() if a[0] != "refused"} == {}
    assert max(seconds for _, seconds in answers.values()) < 20
    assert told["events"] == []
    assert not (tmp_path / "canary").exists()


def test_every_truncation_is_refused(tmp_path):
    raw, path = small(), tmp_path / "cut.pt"
    for end in [*range(0, 64), *range(64, len(raw), 100_003), *range(len(raw) - 200, len(raw))]:
        path.write_bytes(raw[:end])
        with pytest.raises(FanalError, match="cut off|no zip archive|not where"):
            load_adm(FORM.format(path))


def fuzz(tmp_path, count, seed):
    """Read mutated checkpoints while one watches: the pickle and the directory are hit as often as the values."""
    source, path = random.Random(seed), tmp_path / "mutated.pt"
    raw = saved(state(mults=(1,), attends=()))
    start, end = raw.index(b"\x80\x02"), raw.index(b"archive/data/0")
    directory = raw.index(b"PK\x01\x02")

    def files():
        for _ in range(count):
            low, high = source.choice([(0, start + 200), (start, end), (directory, len(raw)), (0, len(raw))])
            yield raw[:low] + mutated(raw[low:high], source) + raw[high:]

    def whole(path):
        model = load_adm(FORM.format(path))
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())

    path.write_bytes(raw)
    whole(path)
    return watched(lambda: refusals(whole, path, files()))


def test_mutated_checkpoints_load_or_are_refused(tmp_path):
    assert 150 < fuzz(tmp_path, 300, 0) < 300


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_mutated_checkpoints_load_or_are_refused(tmp_path, seed):
    assert 1000 < fuzz(tmp_path, 2500, seed) < 2500


@pytest.mark.slow
def test_imagenet_size_loads_within_memory(tmp_path):
    sizes, _, _ = PUBLISHED["adm:64x64_diffusion"]
    path = save(
        tmp_path / "64x64_diffusion.pt", {name: torch.full(shape, 0.01) for name, shape in shapes(**sizes).items()}
    )
    code = (
        "import resource, sys; from fanal.adapters import load_adm\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model = load_adm('adm:' + sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, sum(p.numel() for p in model.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    peak, count = map(int, done.stdout.split())
    # The file's pages are counted too, and can be dropped at any time.
    assert peak * 1024 < 2.2 * 4 * count
