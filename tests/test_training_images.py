"""`fanal train` on images: a folder or zip file in, a model out, at every size that has a preset."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import fanal as package
from fanal.curves import _ticks, curve
from fanal.datasets import get
from fanal.datasets.folder import Folder
from fanal.errors import FanalError
from fanal.nets import read_card
from fanal.optimization import TrainingState
from fanal.presets import own_images, preset, preset_side
from fanal.progress import left, training_bar
from fanal.recipes import RECIPES, Recipe, change
from fanal.training import previous, train
from toys import fanal, refused, same, samples

CPU = torch.device("cpu")


def draw(folder, count=12, side=40, classes=("disc", "square"), seed=0):
    """Pictures of a disc or a square, in color."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side - 0.5
    for kind in classes:
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            u, v = random.uniform(-0.2, 0.2, 2)
            inside = np.hypot(x - u, y - v) < 0.2 if kind == "disc" else np.maximum(abs(x - u), abs(y - v)) < 0.2
            color = random.integers(100, 256, 3)
            Image.fromarray((inside[..., None] * color).astype(np.uint8)).save(folder / kind / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def trained(*words):
    done = fanal("train", *words)
    assert done.exit_code == 0, done.output
    return done.stdout


SHORT = ("--iterations", 3, "--batch", 4, "--evaluate", 0)


@pytest.mark.parametrize(("side", "packed"), [(8, False), (16, True), (32, False)])
def test_from_images_to_samples(tmp_path, side, packed):
    draw(tmp_path / "photos")
    name = "photos"
    if packed:
        shutil.make_archive("photos", "zip", "photos")
        shutil.rmtree("photos")
        name = "photos.zip"
    told = trained(name, "--size", side, "--out", "m", *SHORT, *(("--evaluate", 8) if side == 8 else ()))
    assert re.search(r"images +20 to train on, 4 held out", told)
    assert re.search(rf"size +{side}x{side}, color", told)
    assert re.search(r"classes +2, told to the model", told)
    card = read_card("m")
    assert (card["iterations"], card["recipe"]["data"]) == (3, f"folder:{name},size={side}")
    assert ("calibration" in card) == (side == 8)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "curve.png",
        "log.jsonl",
        "model.json",
        "model.safetensors",
        "samples",
    ]
    for picture in (tmp_path / "m" / "curve.png", tmp_path / "m" / "samples" / "0000003.png"):
        with Image.open(picture) as image:
            image.load()
    model = package.load("./m", labels=1)
    assert model.shape == (3, side, side)
    assert fanal("sample", "./m", "--label", 1, "--count", 2, "--steps", 2, "--out", "s").exit_code == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("side", [8, 12, 28, 40, 64, 128])
def test_presets_can_be_built_and_take_a_step(tmp_path, side, device):
    draw(tmp_path / "photos", count=3, side=side, classes=("disc",))
    dataset = get(f"folder:photos,size={side}")
    recipe = preset(dataset, device)
    assert recipe.precision == ("bf16" if device == "cuda" else "float32")
    # The networks of a GPU are cut down to a quarter of their channels, so that a CPU can take the step.
    smaller = {"net.model_channels": recipe.net.model_channels // 4} if device == "cuda" else {}
    run = TrainingState.start(change(recipe, {"batch": 1, **smaller}), dataset, None, CPU)
    for _ in range(2):
        assert np.isfinite(run.step())


def test_presets_for_a_gpu_have_the_size_they_are_meant_to_have(tmp_path):
    from fanal.nets import Preconditioned

    draw(tmp_path / "photos", count=3, side=16, classes=("disc",))
    for side, least, most in ((16, 1e6, 1e7), (32, 1e7, 5e7), (64, 2e7, 6e7), (128, 1e7, 6e7)):
        recipe = preset(get(f"folder:photos,size={side}"), "cuda")
        with torch.device("meta"):
            net = Preconditioned(recipe.net, (3, side, side))
        assert least < sum(p.numel() for p in net.parameters()) < most


@pytest.mark.parametrize("side", [7, 9, 36, 132, 256])
def test_sizes_without_a_preset_are_refused(tmp_path, side):
    draw(tmp_path / "photos", count=2, side=16)
    with pytest.raises(FanalError, match=f"got {side}: choose another --size"):
        preset(get(f"folder:photos,size={side}"))


def test_the_size_follows_the_images_and_the_device():
    wanted = {5: 8, 8: 8, 11: 8, 12: 12, 17: 16, 28: 28, 33: 32, 500: 32}
    assert {side: preset_side(side) for side in wanted} == wanted
    assert {side: preset_side(side, "cuda") for side in (40, 50, 64, 4000)} == {40: 40, 50: 32, 64: 64, 4000: 64}


def test_presets_follow_the_number_of_images(tmp_path, monkeypatch):
    draw(tmp_path / "few", count=12, side=16)
    few = preset(get("folder:few"))
    assert (few.iterations, few.held_out_count, few.conditional, few.label_dropout) == (800, 4, True, 0.1)
    assert few.augment > 0
    assert few.net.augment_dim == 9

    assert preset(get("folder:few"), "cuda").iterations == 800

    class Many(Folder):
        def count(self, split):
            return 10**6 if split == "train" else 10**5

    dataset = get("folder:few")
    many = preset(Many(**{name: getattr(dataset, name) for name in Folder.__dataclass_fields__}))
    assert (many.iterations, many.held_out_count, many.augment) == (6000, 256, 0.0)
    monkeypatch.setattr(Many, "count", lambda self, split: 200)
    some = preset(Many(**{name: getattr(dataset, name) for name in Folder.__dataclass_fields__}))
    assert (some.iterations, some.iterations * some.batch / 200) == (3750, 600)
    assert preset(dataset, conditional=False).conditional is False
    draw(tmp_path / "one", count=12, side=16, classes=("disc",))
    assert preset(get("folder:one")).conditional is False


def test_everything_can_be_overridden(tmp_path):
    draw(tmp_path / "photos", side=16)
    words = ("--seed", 5, "--accumulate", 2, "--learning-rate", 1e-3, "--precision", "bf16", "--augment", 0.2, "--flip")
    more = ("--label-dropout", 0.3, "--ema", "power:0.1", "--ema", 0.9, "--threads", 1, "--objective", "dae")
    settings = ("--set", "net.widths=[8, 16]", "--set", "noise_levels.std=1.5", "--set", "clip=2")
    trained("photos", "--out", "m", *SHORT, *words, *more, *settings, "--sample-every", 0)
    recipe = Recipe.from_dict(read_card("m")["recipe"])
    assert (recipe.seed, recipe.accumulate, recipe.learning_rate, recipe.precision) == (5, 2, 1e-3, "bf16")
    assert (recipe.augment, recipe.flip, recipe.label_dropout, recipe.ema) == (0.2, True, 0.3, ("power:0.1", 0.9))
    assert (recipe.net.widths, recipe.noise_levels.std, recipe.clip, recipe.objective) == ((8, 16), 1.5, 2, "dae")
    assert package.load("m/ema/exponential-0.9").shape == (3, 16, 16)


def test_without_classes(tmp_path):
    draw(tmp_path / "photos", side=8)
    told = trained("photos", "--unconditional", "--out", "m", *SHORT)
    assert "2, not told to the model" in told
    assert read_card("m")["recipe"]["label_dropout"] == 0
    with pytest.raises(FanalError, match="takes no class labels"):
        package.load("m", labels=1)
    draw(tmp_path / "one", side=8, classes=("disc",))
    (tmp_path / "one" / "disc").rename(tmp_path / "loose")
    done = fanal("train", "loose", "--conditional", "--out", "n", *SHORT)
    assert done.exit_code == 2
    assert "has no classes" in done.stderr


def test_a_bad_image_stops_the_run_before_it_starts(tmp_path):
    draw(tmp_path / "photos", side=8)
    whole = (tmp_path / "photos" / "disc" / "0.png").read_bytes()
    (tmp_path / "photos" / "disc" / "0.png").write_bytes(whole[:60])
    (tmp_path / "photos" / "square" / "1.png").write_text("no image")
    done = fanal("train", "photos", "--out", "m", *SHORT)
    assert done.exit_code == 2
    for word in ("2 of 24 images", "disc/0.png", "square/1.png", "--skip-bad"):
        assert word in done.stderr
    assert not (tmp_path / "m").exists()
    told = trained("photos", "--skip-bad", "--out", "m", *SHORT)
    assert "2 unusable ones skipped" in told
    skipped = read_card("m")["skipped"]
    assert skipped["count"] == 2
    assert [text.split()[0] for text in skipped["named"]] == ["disc/0.png", "square/1.png"]


def test_an_unfinished_run_goes_on_with_its_own_recipe(tmp_path, monkeypatch):
    draw(tmp_path / "photos", side=16)
    recipe, dataset = own_images("photos", "m")
    recipe = change(recipe, {"iterations": 8, "batch": 4, "learning_rate": 1e-3, "warmup": 2})
    whole = train(recipe, "whole", dataset=dataset, sample_every=0)
    step = TrainingState.step

    def killed(self, stop=lambda: False):
        if self.iteration == 5:
            raise KeyboardInterrupt
        return step(self, stop)

    monkeypatch.setattr(TrainingState, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, "m", dataset=dataset, sample_every=0, checkpoint_every=2)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert previous("m") == recipe
    assert own_images("photos", "m")[0] == recipe
    assert own_images("photos")[0] != recipe
    assert own_images("photos", "m", size=8)[0].data == "folder:photos,size=8"
    trained("photos", "--out", "m", "--evaluate", 0, "--sample-every", 0)
    after = package.load("m").denoiser.state_dict()
    assert all(torch.equal(after[name], value) for name, value in whole.state_dict().items())
    assert previous("m") == recipe
    assert previous("photos") is None


def test_a_zip_file_that_a_recipe_names(tmp_path):
    draw(tmp_path / "photos", side=8)
    shutil.make_archive("photos", "zip", "photos")
    (tmp_path / "r.toml").write_text(
        'data = "folder:photos.zip,size=8"\niterations = 3\nbatch = 4\nheld_out_count = 4\nflip = true\n'
        'ema = ["power:0.1", 0.9]\n[net]\narchitecture = "unet"\nwidths = [8, 8]\nfactor = 1\n'
    )
    trained("r.toml", "--out", "m", "--evaluate", 8)
    assert read_card("m")["recipe"]["ema"] == ["power:0.1", 0.9]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("photo", "--out", "m"), "unknown recipe 'photo'"),
        (("photos", "--out", "m", "--set", "bach=3"), "unknown recipe field 'bach': did you mean 'batch'"),
        (("photos", "--out", "m", "--set", "batch"), "--set takes KEY=VALUE"),
        (("photos", "--out", "m", "--size", 9), "got 9"),
        (("photos", "--out", "m", "--precision", "half"), "unknown precision 'half'"),
        (("photos", "--out", "m", "--ema", "0.9", "--ema", "power:1"), "sigma_rel"),
        (("photos", "--out", "m", "--ema", "fast"), "power:SIGMA_REL"),
        (("photos", "--out", "m", "--accumulate", 99), "accumulated in 99 pieces"),
        (("photos", "--out", "m", "--augment", 2), "augment must be in [0, 1)"),
        (("photos", "--out", "m", "--device", "tpu0"), "device 'tpu0' is not to be had here"),
        (("photos", "--out", "m", "--label-dropout", 0.1, "--unconditional"), "there are no labels"),
        (("grid2", "--out", "m", "--size", 8), "--size and --skip-bad are for"),
        (("photos/disc/0.png", "--out", "m"), "no whole zip file"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, words, told):
    draw(tmp_path / "photos", count=3, side=8)
    done = fanal("train", *words)
    assert (done.exit_code, done.stdout.count("model:")) == (2, 0)
    assert told in " ".join(done.stderr.split()), done.stderr
    assert not (tmp_path / "m").exists()


def test_only_the_first_of_several_processes_speaks(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    done = fanal("train", "nothing.toml", "--out", "m")
    assert (done.exit_code, done.output) == (2, "")
    monkeypatch.setenv("RANK", "0")
    assert "nothing.toml" in fanal("train", "nothing.toml", "--out", "m").stderr


# The course of a training


def test_the_time_left_is_told(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fanal.progress.time.monotonic", lambda: now[0])
    with training_bar(RECIPES["grid2"], 500, wanted=True) as advance:  # 8,500 iterations
        for _ in range(100):
            now[0] += 0.5
            advance(0.25)
    told = capsys.readouterr().err.splitlines()
    assert told == ["540 of 8500 iterations, loss 0.2500, 2 it/s, about 66 min left"]
    with training_bar(RECIPES["grid2"], 500, wanted=False) as advance:
        now[0] += 1e4
        advance(0.25)
    assert capsys.readouterr().err == ""
    assert [left(s) for s in (3, 99, 600, 20_000)] == ["3 s", "99 s", "10 min", "5.6 h"]


def test_the_curve_shows_both_losses():
    entries = [{"iteration": 100 * k, "loss": 1 / k} for k in range(1, 20)]
    for entry in entries[4::5]:
        entry["held_out"] = {"mean": entry["loss"] + 0.3, "standard_error": 0.05}
    colors = {color for _, color in curve(entries).getcolors(10**6)}
    plain, held = (0x88, 0x99, 0xA6), (0xF0, 0xA2, 0x02)
    assert {plain, held} <= colors
    without = [{k: v for k, v in entry.items() if k != "held_out"} for entry in entries]
    assert held not in {color for _, color in curve(without).getcolors(10**6)}
    for few in ([], entries[:1], [{"iteration": 1, "loss": 0.0}], json.loads(json.dumps(entries[4:5]))):
        assert curve(few).size == (720, 400)
    assert _ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert _ticks(0.13, 0.31) == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.35])


def test_a_folder_with_an_embedded_models_name_is_told_apart(tmp_path, monkeypatch):
    """The figures and the advice are those of the folder, not of the model that comes with the package."""
    monkeypatch.chdir(tmp_path)
    done = fanal("train", "grid2", "--iterations", 3, "--batch", 8, "--evaluate", 0, "--out", "grid2")
    assert done.exit_code == 0, done.output
    assert "fanal sample ./grid2" in done.stdout
    own = json.loads((tmp_path / "grid2" / "model.json").read_text(encoding="utf-8"))["card"]
    assert f"{own['seconds']:.0f}" in done.stdout.split("seconds of training")[1].split("\n")[0]


def test_classes_keep_their_names(tmp_path, monkeypatch):
    """Sub-folders name the classes: on the card, in the summary, and as labels."""
    monkeypatch.chdir(tmp_path)
    for kind, level in (("discs", 40), ("squares", 200)):
        (tmp_path / "pics" / kind).mkdir(parents=True)
        for i in range(6):
            Image.new("L", (8, 8), level + i).save(tmp_path / "pics" / kind / f"{i}.png")
    done = fanal("train", "pics", "--conditional", "--iterations", 2, "--batch", 4, "--evaluate", 0, "--out", "m")
    assert done.exit_code == 0, done.output
    assert "0 discs, 1 squares" in done.stdout
    words = ("sample", "./m", "--count", 2, "--steps", 2)
    for label in ("squares", 1):
        assert fanal(*words, "--label", label, "--out", f"by-{label}").exit_code == 0
    assert same(samples(tmp_path / "by-squares"), samples(tmp_path / "by-1"))
    assert refused(fanal(*words, "--label", "square"), "unknown class 'square': did you mean 'squares'")
    assert refused(fanal("train", "by-1", "--out", "n"), "is a run folder of fanal, no folder of images")
