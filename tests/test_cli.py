"""The command line: what it prints, what it leaves, and how it refuses."""

from __future__ import annotations

import json

import pytest
import torch
import typer

import generated
from fanal.cli import app, options
from fanal.datasets import get
from fanal.errors import FanalError
from fanal.generation import SampleConfig, generate
from fanal.loading import embedded
from toys import fanal, part_of, record, refused, samples

SAMPLE = ("sample", "mixture:grid2", "--steps", 5, "--count", 6)


# Fixtures
elsewhere = generated.elsewhere
net = generated.net
the_toys_count_only_where_asked = generated.the_toys_count_only_where_asked


def test_sample_leaves_the_run_that_generate_leaves(tmp_path):
    told = fanal(*SAMPLE, "--seed", 4, "--solver", "churn:s_churn=10", "--schedule", "logsnr", "--out", tmp_path / "a")
    assert told.exit_code == 0, told.output
    assert told.stdout.strip().splitlines()[-1] == f"report: {tmp_path / 'a' / 'report.html'}"
    assert "6 samples of mixture:grid2 with churn:s_churn=10, 5 steps." in told.stdout
    assert "spread: total variance relative to held-out real data" in " ".join(told.stdout.split())
    config = SampleConfig("mixture:grid2", solver="churn:s_churn=10", schedule="logsnr", steps=5, count=6, seed=4)
    generate(config, tmp_path / "b")
    assert torch.equal(samples(tmp_path / "a")["x"], samples(tmp_path / "b")["x"])
    assert record(tmp_path / "a")["config"] == record(tmp_path / "b")["config"]


def test_every_option_reaches_the_run(tmp_path, net):
    words = {
        "--solver": "heun",
        "--schedule": "polynomial:rho=5",
        "--steps": 6,
        "--sigma-min": 0.01,
        "--sigma-max": 50.0,
        "--count": 5,
        "--seed": 9,
        "--block": 3,
        "--flag": 0.25,
        "--label": 2,
        "--guidance": 1.5,
        "--threads": 1,
        "--device": "cpu",
    }
    flat = [word for pair in words.items() for word in pair]
    out = fanal(
        "sample", net, *flat, "--no-zero", "--trajectory", "--guard", "renoise", "--guard", "redo", "--out", "r"
    )
    assert out.exit_code == 0, out.output
    wanted = {name[2:].replace("-", "_"): value for name, value in words.items()}
    wanted |= {"model": net, "zero": False, "trajectory": True, "guard": ["renoise", "redo"]}
    wanted |= {"prompt": None, "captions": None, "negative": "", "allow_bin": False, "jump": None}
    wanted |= dict.fromkeys(("catch", "alarms", "detector", "calibration", "labels", "noise")) | {"calibrate": 256}
    assert record(tmp_path / "r")["config"] == wanted
    assert (tmp_path / "r" / "trajectory.safetensors").is_file()


def test_the_table_on_the_terminal_is_the_records(tmp_path):
    told = fanal(*SAMPLE, "--count", 40, "--guard", "redo", "--out", "r")
    row = record(tmp_path / "r")["results"]["table"][0]
    assert f"{100 * row['wrong']['value']:.1f} ± {100 * row['wrong']['se']:.1f} %" in told.stdout
    flagged = record(tmp_path / "r")["results"]["flagged"]
    assert f"which costs no call, flagged {flagged}" in told.stdout
    assert flagged == int(samples(tmp_path / "r")["flagged"].sum())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("sample", "handz32"), ["unknown model 'handz32'", "mixture:grid2"]),
        (("sample", "mixture:gird2"), ["unknown mixture 'gird2'", "did you mean 'grid2'"]),
        ((*SAMPLE, "--solver", "hein"), ["unknown solver 'hein'", "did you mean 'heun'"]),
        ((*SAMPLE, "--solver", "churn:s_chrun=3"), ["unknown field of solver churn", "did you mean 's_churn'"]),
        ((*SAMPLE, "--solver", "churn:s_churn=lots"), ["s_churn must be like 40.0, got 'lots'"]),
        ((*SAMPLE, "--schedule", "logsrn"), ["unknown schedule 'logsrn'", "did you mean 'logsnr'"]),
        ((*SAMPLE, "--schedule", "uniform", "--sigma-min", 40), ["no decreasing grid", "try logsnr"]),
        ((*SAMPLE, "--guard", "redoo"), ["unknown guard 'redoo'", "did you mean 'redo'"]),
        ((*SAMPLE, "--guard", "redo", "--guard", "redo"), ["each guard can be given once"]),
        ((*SAMPLE, "--flag", 1.5), ["strictly between 0 and 1, got 1.5"]),
        ((*SAMPLE, "--sigma-min", 0), ["need 0 < sigma_min < sigma_max < inf, got 0.0 and 80.0"]),
        ((*SAMPLE, "--sigma-max", 0.001), ["need 0 < sigma_min < sigma_max"]),
        ((*SAMPLE, "--label", 3), ["takes no class labels"]),
        ((*SAMPLE, "--label", "eech"), ["label is a whole number or 'each', got 'eech'"]),
        ((*SAMPLE, "--label", "each"), ["takes no class labels"]),
        ((*SAMPLE, "--prompt", "a boat"), ["mixture:grid2 takes no prompt"]),
        ((*SAMPLE, "--negative", "blur"), ["mixture:grid2 takes no prompt"]),
        ((*SAMPLE, "--prompt", "a boat", "--captions", "c.txt"), ["one prompt for all samples or a caption file"]),
        ((*SAMPLE, "--schedule", "native"), ["has no schedule of its own"]),
        ((*SAMPLE, "--jump", 0.001), ["jump needs a decreasing grid with a positive node at or below at=0.001"]),
        ((*SAMPLE, "--allow-bin"), ["no diffusers pipeline"]),
        ((*SAMPLE, "--guidance", 2), ["guidance needs labels"]),
        ((*SAMPLE, "--device", "warp"), ["device 'warp' is not to be had here"]),
        ((*SAMPLE, "--count", 2000000), ["count must be in"]),
        (("sample", "python:toys:nan", "--steps", 8), ["not finite after step", "sigma", "seeds [1]", "of 8"]),
        (("sample", "python:toys:flat"), ["must return the shape of x: got (32, 1) for x of shape (32, 2)"]),
        (("sample", "python:toys:listed"), ["must return the shape of x: got list"]),
        (("sample", "python:toys:bare"), ["attributes shape, sigma_min and sigma_max"]),
        (("sample", "python:toys:NUMBER"), ["is no function that makes a denoiser"]),
        (("sample", "python:nowhere:f"), ["cannot import nowhere"]),
        (("demo", "--model", "handz32"), ["unknown model"]),
        (("train", "handz32", "--out", "m"), ["unknown recipe 'handz32'", "did you mean"]),
        (("train", "nothing.toml", "--out", "m"), ["cannot read the recipe nothing.toml"]),
        (("models", "info", "handz32"), ["unknown model"]),
        (("models", "info", "gaussian:tilted2"), ["it has no card"]),
        (("report", "nowhere"), ["nowhere is not a run folder"]),
    ],
)
def test_a_mistake_costs_one_line_and_status_2_and_leaves_nothing(tmp_path, words, parts):
    result = fanal(*words)
    if words[0] == "demo":  # it says what it is about to do first
        assert result.stdout.count("\n") <= 1
    assert refused(result, *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_does_not_exist_is_refused(tmp_path, net, label):
    assert refused(fanal("sample", net, "--label", label), "whole numbers in [0, 2]", label)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("--steps", 0), ("--count", "many"), ("--blokc", 3), ("--threads", 0)])
def test_options_that_make_no_sense_are_refused_by_name(tmp_path, words):
    result = fanal(*SAMPLE, *words)
    assert result.exit_code == 2
    assert words[0] in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_foreign_folder_is_never_deleted(tmp_path, overwrite):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert refused(fanal(*SAMPLE, "--out", "mine", *overwrite), "is not a run folder; choose another --out")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_place_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert refused(fanal(*SAMPLE, "--out", "file/run"), "cannot write", "try another --out")
    assert refused(fanal(*SAMPLE, "--out", "file"), "is not a run folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_finished_run_is_replaced_only_when_asked(tmp_path):
    assert fanal(*SAMPLE, "--out", "r").exit_code == 0
    before = samples(tmp_path / "r")["x"]
    assert refused(fanal(*SAMPLE, "--seed", 1, "--out", "r"), "holds a finished run", "--overwrite", "fanal report")
    assert torch.equal(samples(tmp_path / "r")["x"], before)
    assert fanal(*SAMPLE, "--seed", 1, "--out", "r", "--overwrite").exit_code == 0
    assert not torch.equal(samples(tmp_path / "r")["x"], before)
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("command", ["geometry", "audit", "encode", "interpolate"])
def test_help_names_every_form_of_data(command):
    (option,) = [each for each in typer.main.get_command(app).commands[command].params if each.name == "data"]
    assert options.DATA in option.help
    with pytest.raises(FanalError) as refusal:
        get("nothing")
    forms = [name for name in str(refusal.value).split("known: ")[1].split(", ") if ":" in name]
    assert forms == ["array:FILE.npy", "folder:DIR"]
    assert all(form in options.DATA for form in forms)


def test_a_run_without_a_page_says_where_its_figures_are(tmp_path):
    words = ("bench", "jumps", "grid2", "--steps", 2, "--count", 4, "--out", "r")
    assert fanal(*words).exit_code == 0
    assert refused(fanal("report", "r"), "has no page", "what it found is in r/tables.md")
    for name in ("tables.md", "plots.html"):
        (tmp_path / "r" / name).unlink()
    assert refused(fanal("report", "r"), "what it found is in r/run.json")


@pytest.mark.parametrize(
    ("words", "place", "name"),
    [
        (SAMPLE, "fanal.report", "headline"),
        (("geometry", "mixture:ring8", "--steps", 6, "--count", 3), "fanal.report.geometry.words", "tables"),
    ],
)
def test_ctrl_c_after_the_run_says_that_it_is_finished(tmp_path, monkeypatch, words, place, name):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"{place}.{name}", stop)
    result = fanal(*words, "--out", tmp_path / "r")
    assert result.exit_code == 130
    assert result.stderr.strip() == f"stopped; the run in {tmp_path / 'r'} is finished"
    monkeypatch.undo()
    assert fanal("report", tmp_path / "r").exit_code == 0


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(tmp_path, monkeypatch):
    import fanal.generation as generation

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "_work", stop)
    result = fanal(*SAMPLE, "--out", "r")
    assert result.exit_code == 130
    assert result.stderr.strip() == "stopped; run the same command again to go on"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert fanal(*SAMPLE, "--out", "r").exit_code == 0
    assert not part_of(tmp_path / "r").exists()


def test_the_demo_is_the_sample_command_with_guards(tmp_path):
    told = fanal("demo", "--model", "mixture:grid2", "--count", 12, "--seed", 2, "--out", "d")
    assert told.exit_code == 0, told.output
    words = ("--guard", "redo", "--guard", "renoise", "--trajectory", "--block", 6)
    assert fanal("sample", "mixture:grid2", "--count", 12, "--seed", 2, *words, "--out", "s").exit_code == 0
    assert torch.equal(samples(tmp_path / "d")["x"], samples(tmp_path / "s")["x"])
    assert record(tmp_path / "d")["config"] == record(tmp_path / "s")["config"]
    assert record(tmp_path / "d")["command"] == "demo"
    assert told.stdout.strip().splitlines()[-1] == f"report: {tmp_path / 'd' / 'report.html'}"


def test_models_are_listed_with_what_their_cards_say():
    told = fanal("models", "list")
    assert told.exit_code == 0, told.output
    for name in embedded():
        assert name in told.stdout


def test_info_prints_the_card(tmp_path, net):
    told = fanal("models", "info", net)
    assert told.exit_code == 0, told.output
    about = json.loads(told.stdout)
    assert (about["shape"], about["sigma_max"], about["recipe"]) == ([1, 8, 8], 80.0, {})


@pytest.mark.parametrize("evaluate", [1, 7])
def test_too_few_samples_to_judge_on_are_refused_before_the_training(tmp_path, evaluate):
    words = ("train", "grid2", "--iterations", 1, "--evaluate", evaluate, "--out", "m")
    assert refused(fanal(*words), "at least 8", evaluate)
    assert list(tmp_path.iterdir()) == []


def test_a_trained_model_can_be_sampled_at_once(tmp_path):
    words = ("train", "grid2", "--iterations", 5, "--batch", 16, "--evaluate", 16, "--out", "m")
    told = fanal(*words)
    assert told.exit_code == 0, told.output
    assert "m; try: fanal sample ./m --guard redo" in told.stdout
    about = json.loads((tmp_path / "m" / "model.json").read_text())["card"]
    assert about["recipe"]["iterations"] == 5
    assert about["calibration"]["count"] == about["hallucination"]["n"] == 16
    assert fanal("sample", "m", "--count", 4, "--guard", "redo", "--out", "r").exit_code == 0
    assert record(tmp_path / "r")["results"]["calibration"]["threshold"] == about["calibration"]["threshold"]
    assert record(tmp_path / "r")["network"]["calibration"] == 0


@pytest.mark.parametrize(
    "content",
    ["{}", '{"command": "sample"}', "[]", "nonsense", '{"command": 1, "config": [], "results": 2, "seeds": "x"}'],
)
def test_a_report_of_what_is_no_run_is_refused(tmp_path, content):
    fanal(*SAMPLE, "--out", "r")
    (tmp_path / "r" / "run.json").write_text(content)
    page = (tmp_path / "r" / "report.html").read_bytes()
    assert refused(fanal("report", "r"), "r")
    assert (tmp_path / "r" / "report.html").read_bytes() == page
