"""Caption files, the choice of captions, and CLIP scores of a tiny random CLIP against transformers' own processing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clips import make_clip
from fanal.errors import FanalError
from fanal.metrics import Captions, Clip, choose_captions, clip_score, read_captions, write_captions
from fanal.metrics.clip import Preparation


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random CLIP of 30,000 parameters, saved as any CLIP is."""
    return make_clip(tmp_path_factory.mktemp("clip"))


def pictures(n, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def theirs(folder, images, **changes):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder, **changes)
    return processor([Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images], return_tensors="pt")["pixel_values"]


# CLIP


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": {"height": 17, "width": 40}, "crop_size": {"height": 20, "width": 31}},
        {"do_resize": False},
        {"do_center_crop": False, "resample": 2},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [1.0, 2.0, 3.0], "image_std": [50.0, 60.0, 70.0]},
        {"size": {"shortest_edge": 13}, "crop_size": {"height": 16, "width": 11}},
    ],
)
@pytest.mark.parametrize("shape", [(41, 64), (64, 41), (30, 30), (9, 12)])
def test_images_are_prepared_as_transformers_prepares_them(tiny, tmp_path, changes, shape):
    content = json.loads((tiny / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content | changes))
    images = pictures(3, *shape)
    ours, wanted = Preparation.read(tmp_path)(images), theirs(tmp_path, images)
    assert ours.shape == wanted.shape
    assert (ours - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))


def test_a_combined_processor_file_says_the_same(tiny, tmp_path):
    content = json.loads((tiny / "preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": content}))
    assert Preparation.read(tmp_path) == Preparation.read(tiny)


def test_clip_is_the_models_own_cosine(tiny):
    from transformers import CLIPModel, CLIPTokenizer

    clip, images = Clip(str(tiny)), pictures(4, 50, 40)
    texts = ["a cat on the mat .", "two hands", "dog " * 40, "The DOG"]
    found = clip(images, texts)
    model, tokenizer = CLIPModel.from_pretrained(tiny).eval(), CLIPTokenizer.from_pretrained(tiny)
    for i, text in enumerate(texts):
        words = tokenizer([text], truncation=True, max_length=8, return_tensors="pt")
        with torch.no_grad():
            out = model(**words, pixel_values=theirs(tiny, images[i : i + 1]))
        cosine = out.logits_per_image / model.logit_scale.detach().exp()
        assert float(cosine) == pytest.approx(float(found[i]), abs=1e-5)
    assert torch.equal(clip(images, texts), found)
    assert (clip(images[:1], texts[:1]) - found[:1]).abs() < 1e-5


def test_the_score_is_a_mean_of_positive_cosines():
    found = clip_score(torch.tensor([0.2, 0.4, -0.3, 0.1]))
    assert found.value == pytest.approx(17.5, rel=1e-6)
    assert found.se == pytest.approx(np.std([20, 40, 0, 10], ddof=1) / 2, rel=1e-6)


def test_gray_images_and_floats_are_seen_as_pictures(tiny):
    clip, gray = Clip(str(tiny)), pictures(2, 30, 30)[:, :1]
    color = gray.expand(-1, 3, -1, -1)
    assert torch.equal(clip(gray, ["a cat", "a dog"]), clip(color, ["a cat", "a dog"]))
    assert torch.equal(clip(gray.float() / 127.5 - 1, ["a cat", "a dog"]), clip(gray, ["a cat", "a dog"]))


def test_a_clip_from_the_hub_comes_from_the_filled_cache(tiny, tmp_path, monkeypatch):
    import shutil

    from huggingface_hub import constants

    commit, folder = "1" * 40, tmp_path / "models--lab--clip"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(tiny, folder / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    clip = Clip("lab/clip")
    assert (clip.name, clip.sha256) == ("lab/clip", Clip(str(tiny)).sha256)
    with pytest.raises(FanalError, match="cannot fetch hub:lab/none"):
        Clip("lab/none")


def copied(tiny, folder, *left_out):
    for file in tiny.iterdir():
        if file.name not in left_out:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_weights_that_are_pickles_are_never_read(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Trap:
        def __reduce__(self):
            return (open, ("executed", "w"))

    folder = copied(tiny, tmp_path, "model.safetensors")
    torch.save({"x": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(FanalError, match="no weights as safetensors"):
        Clip(str(folder))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("config.json", "{}", "parameters, but the weights' files have"),
        ("config.json", '{"text_config": {"vocab_size": 2000000000}}', "parameters, but the weights' files have"),
        ("model.safetensors", "junk" * 5000, "cannot load"),
        ("preprocessor_config.json", "[]", "preprocessor_config.json"),
        ("preprocessor_config.json", '{"size": {"shortest_edge": 99999}}', "size"),
        ("preprocessor_config.json", '{"image_mean": [0, 0, 0], "image_std": [0, 1, 1]}', "image_std"),
        ("preprocessor_config.json", '{"image_mean": "x", "image_std": [1, 1, 1]}', "image_mean"),
        ("preprocessor_config.json", '{"resample": 9}', "resample"),
    ],
)
def test_a_damaged_clip_is_refused_in_one_line(tiny, tmp_path, name, content, part):
    folder = copied(tiny, tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(FanalError, match=part) as error:
        Clip(str(folder))(pictures(1, 30, 30), ["a cat"])
    assert "\n" not in str(error.value)


def test_weights_that_leave_something_out_are_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copied(tiny, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FanalError, match=r"leave out 1 that a CLIP needs, visual_projection\.weight"):
        Clip(str(folder))


def test_what_is_no_clip_at_all_is_refused(tiny, tmp_path):
    with pytest.raises(FanalError, match="there is no folder"):
        Clip(str(tmp_path / "nowhere"))
    with pytest.raises(FanalError, match="one caption, got 2 images and 1"):
        Clip(str(tiny))(pictures(2, 30, 30), ["a cat"])


# Captions


def coco(entries):
    return json.dumps({"images": [], "annotations": [{"image_id": i, "id": k, "caption": t} for k, (i, t) in entries]})


def test_three_kinds_of_files_say_the_same(tmp_path):
    texts = ["A cat on a mat.", 'Zwölf "Hände"', "two,  dogs"]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    rows = "".join(f"{i}\t{t}\r\n" for i, t in enumerate(texts))
    (tmp_path / "a.tsv").write_text("\ufeffid\tcaption\r\n" + rows, encoding="utf-8", newline="")
    (tmp_path / "a.json").write_text(coco(list(enumerate(enumerate(texts)))), encoding="utf-8")
    found = [read_captions(tmp_path / f"a.{kind}") for kind in ("txt", "tsv", "json")]
    assert found[0] == found[1] == found[2]
    assert found[0].texts == ("A cat on a mat.", 'Zwölf "Hände"', "two, dogs")
    assert found[0].ids == ("0", "1", "2")


@given(st.integers(1, 40), st.integers(0, 2**16))
def test_a_choice_has_one_caption_per_image_and_does_not_depend_on_the_files_order(count, seed):
    random = np.random.default_rng(seed)
    pairs = [(str(i), f"caption {j} of {i}") for i in range(40) for j in range(1 + i % 5)]
    shuffled = [pairs[k] for k in random.permutation(len(pairs))]
    found = choose_captions(Captions(*zip(*pairs, strict=True)), count, seed)
    assert found == choose_captions(Captions(*zip(*shuffled, strict=True)), count, seed)
    assert len(set(found.ids)) == len(found.ids) == count
    assert all(text.endswith(f" of {name}") for name, text in zip(found.ids, found.texts, strict=True))
    if count == 40 and seed:
        assert found != choose_captions(Captions(*zip(*pairs, strict=True)), count, seed + 1)


def test_every_caption_of_an_image_is_as_likely():
    pairs = Captions(("a",) * 4 + ("b",), ("0", "1", "2", "3", "x"))
    counts = [0] * 4
    for seed in range(800):
        chosen = choose_captions(pairs, 2, seed)
        counts[int(dict(zip(chosen.ids, chosen.texts, strict=True))["a"])] += 1
    assert max(abs(n - 200) for n in counts) < 4 * 12.2  # 4 standard deviations of a binomial count


def test_a_choice_survives_the_disk(tmp_path):
    found = choose_captions(Captions(("7", "9", "9"), ("a cat", "two  dogs", "a dog")), 2, 3)
    write_captions(tmp_path / "c.tsv", found)
    read = read_captions(tmp_path / "c.tsv")
    assert read.ids == found.ids
    assert read.texts == tuple(" ".join(t.split()) for t in found.texts)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.csv", b"x", "unknown kind of caption file '.csv'"),
        ("a.txt", b"\xff\xfe\x00", "cannot read"),
        ("a.txt", b"", "has 0 characters"),
        ("a.txt", b"a cat\n\na dog\n", "caption 2 has 0 characters"),
        ("a.txt", b"x" * 20000, "20000 characters"),
        ("a.tsv", b"1\ta cat\n2 a dog\n", "line 2 must be an id, a tab and a caption, got 1"),
        ("a.tsv", b"id\tcaption\n1\ta\tb\n", "line 2"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b"[" * 100000, "a.json"),
        ("a.json", b"[]", "not COCO captions"),
        ("a.json", b'{"annotations": []}', "captions need one id each"),
        ("a.json", b'{"annotations": [{"image_id": 1}]}', "annotation 0"),
        ("a.json", b'{"annotations": [{"image_id": true, "caption": "x"}]}', "annotation 0"),
        ("a.json", b'{"annotations": [3]}', "annotation 0"),
    ],
)
def test_a_file_of_captions_that_is_none_is_refused(tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FanalError) as error:
        read_captions(tmp_path / name)
    assert part in str(error.value)


def test_captions_that_do_not_suffice_are_refused(tmp_path):
    few = Captions(("1", "1", "2"), ("a", "b", "c"))
    with pytest.raises(FanalError, match="captions of 2 images"):
        choose_captions(few)
    with pytest.raises(FanalError, match="written as .tsv"):
        write_captions(tmp_path / "c.txt", few)
    with pytest.raises(FanalError, match="tab"):
        write_captions(tmp_path / "c.tsv", Captions(("a\tb",), ("x",)))


@pytest.mark.parametrize("key", ["attn_implementation", "auto_map", "quantization_config"])
def test_a_clip_that_asks_for_code_is_refused(tiny, tmp_path, key):
    folder = tmp_path / "clip"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"][key] = "someone/kernel"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(FanalError, match=key):
        Clip(str(folder))
