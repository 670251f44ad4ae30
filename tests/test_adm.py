"""guided-diffusion and consistency-models checkpoints: parity, formulas, published settings; hostile files refused."""

from __future__ import annotations

import collections
import json
import math

import numpy as np
import pytest
import torch

import fanal as package
from adm_files import SETTINGS, answer, awake, renamed, save, state
from fanal import loading
from fanal.adapters import CHECKPOINTS, load_adm
from fanal.adapters.predictions import Timesteps
from fanal.errors import FanalError
from fanal.loading import card, fingerprint
from fanal.nets import DhariwalUNetConfig, Preconditioned, load_model
from fanal.nets.preconditioning import boundary, ddpm_levels, ddpm_time
from fanal.schedules import polynomial
from toys import fanal, record, refused, samples

SIDE = 8
LABELS = torch.tensor([0, 2, 1])


def images(count=3, sigma=1.0, side=SIDE):
    return package.noise((3, side, side), range(count), sigma)


def gap(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


def unet(style, classes):
    """The network of diffusers' consistency pipeline, with three levels, and its weights as a checkpoint's."""
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64, 96),
        layers_per_block=2,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=32,
        attn_norm_num_groups=32,
        resnet_time_scale_shift=style,
        downsample_type="resnet",
        upsample_type="resnet",
        num_class_embeds=classes or None,
    )
    net.load_state_dict(awake(net.state_dict()))
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize(("style", "classes"), [("scale_shift", 5), ("default", 0)])
def test_outputs_are_those_of_diffusers(tmp_path, style, classes):
    theirs = unet(style, classes)
    path = save(tmp_path / "edm_mine.pt", renamed(theirs))
    ours = load_adm(f"consistency:{path},size=16,order=new,head_channels=32").net
    x, labels = images(side=16), LABELS if classes else None
    for times in (torch.tensor([0.0, 17.25, 999.0]), torch.tensor([-1553.6, 1095.5, 250.0])):
        expected = theirs(x, times, labels).sample
        got = ours(x, times, labels)
        assert gap(got, expected) <= 1e-5
        assert float((got - expected).norm() / expected.norm()) <= 1e-5
    assert gap(ours(x, times + 1, labels), expected) > 1e-4


@pytest.mark.parametrize("heads", ["head_channels=16", "heads=2"])
def test_the_parity_with_diffusers_can_fail(tmp_path, heads):
    """With another number of heads, or the other order of channels, the outputs are others."""
    theirs = unet("scale_shift", 0)
    path, x, times = save(tmp_path / "edm_mine.pt", renamed(theirs)), images(side=16), torch.tensor([0.0, 17.25, 999.0])
    for order in ("legacy", "new"):
        ours = load_adm(f"consistency:{path},size=16,order={order},{heads}").net
        if order == "legacy" or heads == "head_channels=16":
            assert gap(ours(x, times), theirs(x, times).sample) > 1e-3


@pytest.mark.parametrize("classes", [0, 5])
def test_one_step_is_that_of_diffusers_consistency_pipeline(tmp_path, classes):
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    theirs = unet("scale_shift", classes)
    path = save(tmp_path / "cd_mine.pt", renamed(theirs))
    pipeline = ConsistencyModelPipeline(theirs, CMStochasticIterativeScheduler(clip_denoised=False))
    pipeline.set_progress_bar_config(disable=True)
    start = package.noise((3, 16, 16), range(3), 1.0)
    labels = LABELS.tolist() if classes else None
    kept = []
    pipeline(
        batch_size=3,
        latents=start,
        class_labels=labels,
        num_inference_steps=1,
        output_type="pt",
        callback=lambda i, t, latents: kept.append(latents),
    )
    D = package.load(f"consistency:{path},size=16,head_channels=32,order=new", labels=labels)
    ours = package.sample(D, 80.0 * start, polynomial(1), package.solvers.Euler())
    assert D.denoiser.calls == 1 if classes else D.calls == 1
    assert gap(ours, kept[-1]) <= 1e-5


NETWORKS = {
    "legacy heads and a learned variance": ({"outputs": 6}, "heads=2,order=legacy", {"heads": 2}),
    "new order": ({"outputs": 6}, "heads=2,order=new", {"heads": 2, "order": "new"}),
    "channels per head": ({"classes": 0}, "head_channels=16,order=legacy", {"head_channels": 16}),
    "an added embedding": ({"scale_shift": False, "axes": 2}, "heads=4,order=new", {"heads": 4, "order": "new"}),
    "half the channels": ({"base": 64, "mults": (0.5, 1)}, "heads=1,order=legacy", {"heads": 1}),
    "attention everywhere": (
        {"mults": (1, 2, 3), "blocks": 2, "attends": (0, 1, 2), "outputs": 6},
        "head_channels=32,order=legacy",
        {"head_channels": 32},
    ),
    "one level": (
        {"mults": (2,), "attends": (), "channels": 1, "outputs": 1},
        "heads=2,order=new",
        {"heads": 2, "order": "new"},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_published_description(tmp_path, name):
    sizes, words, how = NETWORKS[name]
    weights = state(**sizes)
    model = load_adm(f"adm:{save(tmp_path / 'a.pt', weights)},size={SIDE},schedule=linear,{words}")
    x, times = images()[:, : model.shape[0]], torch.tensor([0.0, 412.7, 999.0])
    labels = LABELS if model.classes else None
    expected = answer(weights, x, times, labels, **how)
    got = model.net(x, times, labels)
    assert got.shape[1] == weights["out.2.weight"].shape[0]
    assert gap(got, expected) <= 1e-5
    exact = {key: value.double() for key, value in weights.items()}
    expected = answer(exact, x.double(), times.double(), labels, **how)
    assert gap(model.double().net(x.double(), times.double(), labels), expected) <= 1e-12


def test_the_parity_depends_on_every_tensor(tmp_path):
    """With 64 channels a group has two, so that no bias is taken out by the normalization behind it."""
    weights = state(base=64, mults=(1, 1), outputs=6)
    x, times, label = images(1), torch.tensor([412.7]), torch.tensor([1])
    got = load_adm(f"adm:{save(tmp_path / 'a.pt', weights)},{SETTINGS}").net(x, times, label)
    for name, value in weights.items():
        other = answer(weights | {name: value.roll(1) * 1.5 + 0.1}, x, times, label, heads=2)
        assert gap(got, other) > 1e-4, name


def betas(schedule):
    """The betas of guided-diffusion: linear, or from the cosine with at most 0.999 each."""
    if schedule == "linear":
        return np.linspace(1e-4, 0.02, 1000)
    bar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_levels_are_those_of_the_betas(schedule):
    alpha = np.cumprod(1 - betas(schedule))
    levels = ddpm_levels(schedule)
    np.testing.assert_allclose(levels.double().numpy(), np.sqrt((1 - alpha) / alpha), rtol=2e-6)
    assert torch.equal(ddpm_time(levels, levels), torch.arange(1000.0))
    between = torch.logspace(-3, 5, 301, dtype=torch.float64)
    expected = Timesteps(levels.double()).time_of(between)
    torch.testing.assert_close(ddpm_time(between, levels), expected, rtol=1e-12, atol=1e-10)
    with pytest.raises(FanalError, match="noise schedule"):
        ddpm_levels("quadratic")


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_denoised_is_the_formula_of_noise_prediction(tmp_path, schedule):
    weights = state(outputs=6)
    path = save(tmp_path / "a.pt", weights)
    model = load_adm(f"adm:{path},size={SIDE},heads=2,order=legacy,schedule={schedule}")
    alpha = np.cumprod(1 - betas(schedule))
    levels = np.sqrt((1 - alpha) / alpha)
    assert (model.sigma_min, model.sigma_max) == pytest.approx((levels[0], levels[-1]), rel=1e-6)

    def expected(x, sigma, time):
        noise = answer(weights, x / (1 + sigma**2) ** 0.5, torch.full((3,), float(time)), LABELS, heads=2)[:, :3]
        return x - sigma * noise

    for time in (0, 1, 250, 777, 998):
        sigma = float(levels[time])
        x = images(sigma=sigma)
        assert gap(model(x, torch.tensor(sigma), LABELS), expected(x, sigma, time)) <= 1e-5
        middle = float(np.sqrt(levels[time] * levels[time + 1]))  # half-way in log sigma
        assert gap(model(x, torch.tensor(middle), LABELS), expected(x, middle, time + 0.5)) <= 1e-5
    for sigma, time in ((0.001, 0), (1e5, 999)):  # outside of the table: its ends, at the sigma that was asked for
        x = images(sigma=sigma)
        assert gap(model(x, torch.tensor(sigma), LABELS), expected(x, sigma, time)) <= 1e-5
    x, sigmas = images(), torch.tensor([0.1, 1.0, 5.0])
    together = model(x, sigmas, LABELS)
    for i in range(3):
        assert gap(model(x[i : i + 1], sigmas[i], LABELS[i : i + 1])[0], together[i]) <= 1e-5


@pytest.mark.parametrize("kind", ["edm", "consistency"])
def test_denoised_is_the_formula_of_consistency_models(tmp_path, kind):
    weights = state(axes=2)
    path = save(tmp_path / "x.pt", weights)
    model = load_adm(f"consistency:{path},size={SIDE},heads=2,order=new,model={kind}")
    assert (model.sigma_min, model.sigma_max, model.sigma_data) == (0.002, 80.0, 0.5)
    for sigma in (0.002, 0.01, 0.5, 3.0, 80.0):
        x = images(sigma=max(sigma, 0.5))
        times = torch.full((3,), 250 * math.log(sigma))
        out = answer(weights, x / math.sqrt(sigma**2 + 0.25), times, LABELS, heads=2, order="new")
        above = sigma - 0.002 if kind == "consistency" else sigma
        skip, scale = 0.25 / (above**2 + 0.25), above * 0.5 / math.sqrt(sigma**2 + 0.25)
        assert gap(model(x, torch.tensor(sigma), LABELS), skip * x + scale * out) <= 1e-5
    x = images()
    still = torch.equal(model(x, torch.tensor(0.002, dtype=torch.float64), LABELS), x)
    assert still is (kind == "consistency")  # the identity where trajectories end


def test_the_boundary_scalings_are_those_of_diffusers():
    from diffusers import CMStochasticIterativeScheduler

    sigma = torch.tensor([0.002, 0.1, 2.0, 80.0], dtype=torch.float64)
    expected = CMStochasticIterativeScheduler().get_scalings_for_boundary_condition(sigma)
    torch.testing.assert_close(boundary(sigma, 0.5, 0.002), expected, rtol=1e-12, atol=0)


def test_time_has_derivatives_in_sigma():
    levels = ddpm_levels("linear").double()
    sigma = torch.tensor([0.05, 1.0, 20.0], dtype=torch.float64)
    slope = torch.autograd.functional.jvp(lambda s: ddpm_time(s, levels), sigma, torch.ones(3, dtype=torch.float64))[1]
    change = (ddpm_time(sigma + 1e-7, levels) - ddpm_time(sigma - 1e-7, levels)) / 2e-7
    torch.testing.assert_close(slope, change, rtol=1e-6, atol=0)


SPECS = {
    "adm, linear": (f"adm:{{}},{SETTINGS}", {"outputs": 6}),
    "adm, cosine": (
        f"adm:{{}},size={SIDE},head_channels=32,order=new,schedule=cosine",
        {"mults": (0.5, 1), "base": 64},
    ),
    "edm": (f"consistency:{{}},size={SIDE},heads=2,order=new,model=edm", {"axes": 2}),
    "consistency": (
        f"consistency:{{}},size={SIDE},heads=2,order=new,model=consistency",
        {"axes": 2, "classes": 0, "scale_shift": False},
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_conversion_changes_no_bit(tmp_path, name):
    form, sizes = SPECS[name]
    spec = form.format(save(tmp_path / "net.pt", state(**sizes)))
    generator = torch.get_rng_state()
    direct = load_adm(spec)
    assert torch.equal(torch.get_rng_state(), generator)
    told = fanal("convert", spec, tmp_path / "folder")
    assert told.exit_code == 0, told.output
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["model.json", "model.safetensors"]
    folder = load_model(tmp_path / "folder")
    labels = LABELS if direct.classes else None
    for sigma in (direct.sigma_min, 0.5, 3.0, 80.0):
        x = images(sigma=sigma)
        assert torch.equal(direct(x, torch.tensor(sigma), labels), folder(x, torch.tensor(sigma), labels))
    for field in ("config", "shape", "sigma_min", "sigma_max", "classes", "preconditioning"):
        assert getattr(direct, field) == getattr(folder, field)
    about = json.loads((tmp_path / "folder" / "model.json").read_text())["card"]
    assert about["source"]["sha256"] == fingerprint(spec)
    assert about == card(spec) | {"source": about["source"]}
    assert ("note" in about) is (name == "consistency")
    assert not any(p.requires_grad for p in direct.parameters())


def test_every_command_takes_both_forms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "small.pt", state(outputs=6))
    spec = f"adm:small.pt,{SETTINGS}"
    assert fanal("convert", spec, "folder").exit_code == 0
    words = ("--count", 4, "--steps", 3, "--label", 1, "--solver", "heun")
    for model, out in ((spec, "a"), ("./folder", "b")):
        told = fanal("sample", model, *words, "--out", out)
        assert told.exit_code == 0, told.output
        about = fanal("models", "info", model)
        assert about.exit_code == 0, about.output
        assert json.loads(about.stdout)["settings"]["schedule"] == "linear"
    assert torch.equal(samples(tmp_path / "a")["x"], samples(tmp_path / "b")["x"])
    assert record(tmp_path / "a")["config"]["model"] == spec


def test_a_consistency_function_samples_in_one_step(tmp_path):
    spec = SPECS["consistency"][0].format(save(tmp_path / "net.pt", state(axes=2, classes=0)))
    told = fanal("sample", spec, "--count", 3, "--steps", 1, "--out", tmp_path / "run")
    assert told.exit_code == 0, told.output
    assert record(tmp_path / "run")["network"]["evaluations"] == 3
    expected = load_adm(spec)(images(3, 80.0), torch.tensor(80.0))
    torch.testing.assert_close(samples(tmp_path / "run")["x"], expected)


def test_loading_binds_labels_counts_and_samples(tmp_path):
    path = save(tmp_path / "a.pt", state(outputs=6))
    bare, bound = (package.load(f"adm:{path},{SETTINGS}", labels=labels) for labels in (None, 1))
    x = images(4, bare.sigma_max)
    direct = bare(x, torch.tensor(2.0), torch.ones(4, dtype=torch.long))
    torch.testing.assert_close(bound(x, torch.tensor(2.0)), direct)
    sigmas = polynomial(4, bare.sigma_min, bare.sigma_max)
    assert bool(torch.isfinite(package.sample(bound, x, sigmas, package.solvers.Heun())).all())
    with pytest.raises(FanalError, match="a label for each sample"):
        bare(x, torch.tensor(2.0))
    with pytest.raises(FanalError, match="no guidance"):
        bare(x, torch.tensor(2.0), torch.full((4,), 3))
    with pytest.raises(FanalError, match="no guidance"):
        package.load(f"adm:{path},{SETTINGS}", labels=1, guidance=2.0)(x, torch.tensor(2.0))
    told = fanal("sample", f"adm:{path},{SETTINGS}", "--steps", 2, "--count", 1)
    assert refused(told, "--label")


def test_other_ways_to_save_a_state_dict_are_read(tmp_path):
    """In order with metadata, as views of one flat tensor, transposed, as parameters, in half precision."""
    weights = state()
    flat = torch.cat([value.flatten() for value in weights.values()])
    parts = flat.split([value.numel() for value in weights.values()])
    ordered = collections.OrderedDict(weights)
    ordered._metadata = collections.OrderedDict({"": {"version": 1}})  # as module.state_dict() has
    forms = {
        "plain": weights,
        "ordered": ordered,
        "flat": {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)},
        "turned": {name: v.mT.contiguous().mT if v.ndim > 1 else v for name, v in weights.items()},
        "parameters": {name: torch.nn.Parameter(value) for name, value in weights.items()},
    }
    x, sigma = images(), torch.tensor(1.3)
    expected = load_adm(f"adm:{save(tmp_path / 'a.pt', weights)},{SETTINGS}")(x, sigma, LABELS)
    for name, form in forms.items():
        path = save(tmp_path / f"{name},b.pt", form)
        assert torch.equal(load_adm(f"adm:{path},{SETTINGS}")(x, sigma, LABELS), expected), name
    half = {name: value.half() for name, value in weights.items()}
    path = save(tmp_path / "half.pt", half)
    rounded = save(tmp_path / "rounded.pt", {name: value.float() for name, value in half.items()})
    a, b = (load_adm(f"adm:{p},{SETTINGS}")(x, sigma, LABELS) for p in (path, rounded))
    assert torch.equal(a, b)


def test_the_network_no_longer_needs_the_file(tmp_path):
    path = save(tmp_path / "a.pt", state())
    model, x = load_adm(f"adm:{path},{SETTINGS}"), images()
    before = model(x, torch.tensor(1.0), LABELS)
    with open(path, "r+b") as file:
        file.truncate(10)
    assert torch.equal(model(x, torch.tensor(1.0), LABELS), before)


def test_the_kinds_of_specs_agree():
    assert tuple(f"{kind}:" for kind in CHECKPOINTS) == loading._CHECKPOINTS


def test_new_fields_of_the_network_are_checked():
    for change in (
        {"heads": -1},
        {"head_channels": 0},
        {"group_channels": 2.0},
        {"scale_shift": 1},
        {"null_label": "no"},
    ):
        with pytest.raises(FanalError, match=next(iter(change))):
            DhariwalUNetConfig(**change)
    for mult in (0.3, float("nan"), -1, True, 65):
        with pytest.raises(FanalError, match="channel_mult"):
            DhariwalUNetConfig(model_channels=64, channel_mult=(mult,))
    with pytest.raises(FanalError, match="equal groups"):
        Preconditioned(DhariwalUNetConfig(model_channels=36, channel_mult=(1,), group_channels=1), (3, 8, 8))


def test_guidance_without_a_null_label_is_refused_before_a_run(tmp_path):
    path = save(tmp_path / "m.pt", state())
    with pytest.raises(FanalError, match="knows no other: no guidance"):
        package.load(f"adm:{path},{SETTINGS}", labels=1, guidance=2.0)
    package.load(f"adm:{path},{SETTINGS}", labels=1, guidance=1.0)
