"""The U-Nets of EDM checkpoints: parity with figures of the official networks, sizes, and the model folder."""

from __future__ import annotations

import json
import math

import pytest
import torch

from edm_files import INDEX, TINY, make, ours, reference, tiny_state
from fanal.errors import FanalError
from fanal.nets import DhariwalUNetConfig as ADM
from fanal.nets import (
    MLPConfig,
    Preconditioned,
    SongUNetConfig,
    UNetConfig,
    load_model,
    read_card,
    save_model,
)
from fanal.nets.preconditioning import iddpm_levels, vp_level, vp_time

NCSN = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": (1, 3, 3, 1),
}


@pytest.mark.parametrize("name", INDEX)
def test_outputs_are_those_of_the_official_networks(name):
    model, tensors = reference(name)
    x, sigmas, expected = tensors["io.x"], tensors["io.sigma"], tensors["io.D"]
    labels = tensors["io.labels"].argmax(1) if "io.labels" in tensors else None
    assert sum(p.numel() for p in model.parameters()) == INDEX[name]["parameters"]
    assert len(model.state_dict()) == INDEX[name]["state_keys"]
    together = model(x, sigmas, labels)
    for i in range(len(x)):
        label = None if labels is None else labels[i : i + 1]
        alone = model(x[i : i + 1], sigmas[i].double(), label)[0]
        for got in (together[i], alone):
            assert float((got - expected[i]).norm() / expected[i].norm()) <= 1e-5
            assert float((got - expected[i]).abs().max() / expected[i].abs().max()) <= 1e-5


@pytest.mark.parametrize("name", INDEX)
def test_the_parity_depends_on_every_tensor(name):
    """The comparison can fail: another value anywhere, of any tensor, shows in the output."""
    model, tensors = reference(name)
    x, sigmas = tensors["io.x"], tensors["io.sigma"]
    labels = tensors["io.labels"].argmax(1) if "io.labels" in tensors else None

    def gap():
        return float((model(x, sigmas, labels) - tensors["io.D"]).norm() / tensors["io.D"].norm())

    right = gap()
    assert right < 1e-6
    for key, value in model.state_dict().items():
        if not key.endswith(("conv0.weight", "freqs", "resample_filter", "affine.bias", "map_label.weight", "u")):
            continue
        before = value.clone()
        value.mul_(1.5).add_(0.1)
        assert gap() > 3 * right, key
        value.copy_(before)


def test_the_table_of_iddpm_is_the_official_one():
    _, tensors = reference("iddpm")
    levels = iddpm_levels()
    assert levels.shape == (1001,)
    assert float(levels[-1]) == 0
    torch.testing.assert_close(levels, tensors["state.u"], rtol=1e-3, atol=0)  # theirs is summed up in float32
    assert float(levels[-2]) == pytest.approx(INDEX["iddpm"]["sigma_min"], rel=1e-3)
    assert float(levels[0]) == pytest.approx(INDEX["iddpm"]["sigma_max"], rel=1e-5)
    assert vp_level(1.0) == pytest.approx(INDEX["vp_vp"]["sigma_max"], rel=1e-6)


def test_times_and_levels_of_the_variance_preserving_process_are_inverse():
    for t in (1e-3, 0.1, 0.5, 1.0):
        assert float(vp_time(torch.tensor(vp_level(t), dtype=torch.float64))) == pytest.approx(t, rel=1e-9)


@pytest.mark.parametrize(
    ("config", "side", "classes", "millions"),
    [
        (SongUNetConfig(channel_mult=(2, 2, 2), augment_dim=9), 32, 0, (55.7, 1)),  # CIFAR-10, DDPM++
        (SongUNetConfig(channel_mult=(2, 2, 2), augment_dim=9, **NCSN), 32, 10, (56.5, 1)),  # CIFAR-10, NCSN++
        (SongUNetConfig(augment_dim=9, dropout=0.05), 64, 0, (61.8, 1)),  # FFHQ and AFHQv2, DDPM++
        (SongUNetConfig(augment_dim=9, dropout=0.25, **NCSN), 64, 0, (62.5, 1)),
        (ADM(), 64, 1000, (295.9, 0.1)),  # ImageNet
    ],
)
def test_published_networks_have_their_published_sizes(config, side, classes, millions):
    with torch.device("meta"):
        model = Preconditioned(config, (3, side, side), classes=classes)
    value, within = millions
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - value) <= within


def awake(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


SKIPS = SongUNetConfig(
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    encoder_type="skip",
    decoder_type="skip",
    resample_filter=(1, 3, 3, 1),
    label_dropout=0.5,
)


@pytest.mark.parametrize("preconditioning", ["edm", "vp", "ve", "iddpm"])
@pytest.mark.parametrize("config", [SKIPS, ADM(model_channels=32, channel_mult=(1, 2), num_blocks=1)])
def test_a_model_folder_keeps_network_and_preconditioning(tmp_path, config, preconditioning):
    model = awake(Preconditioned(config, (2, 8, 8), classes=3, preconditioning=preconditioning))
    save_model(tmp_path / "m", model, {"data": "none"})
    again = load_model(tmp_path / "m")
    assert read_card(tmp_path / "m") == {"data": "none"}
    assert (again.config, again.classes, again.preconditioning) == (config, 3, preconditioning)
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    for labels in (None, torch.tensor([0, 2, 3])):
        assert torch.equal(again(x, torch.tensor(0.7), labels), model(x, torch.tensor(0.7), labels))
    null = torch.full((3,), 3)
    assert torch.equal(model(x, torch.tensor(0.7), null), model(x, torch.tensor(0.7)))
    assert not torch.allclose(model(x, torch.tensor(0.7), torch.tensor([0, 1, 2])), model(x, torch.tensor(0.7)))


def test_folders_without_a_preconditioning_are_edm(tmp_path):
    save_model(tmp_path / "m", awake(Preconditioned(SKIPS, (1, 8, 8))), {})
    assert "preconditioning" not in json.loads((tmp_path / "m" / "model.json").read_text())
    assert load_model(tmp_path / "m").preconditioning == "edm"


@pytest.mark.parametrize("value", ["emd", 3, None, ["vp"]])
def test_an_unknown_preconditioning_is_refused(tmp_path, value):
    save_model(tmp_path / "m", Preconditioned(SKIPS, (1, 8, 8), preconditioning="vp"), {})
    path = tmp_path / "m" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preconditioning": value}))
    with pytest.raises(FanalError, match="unknown preconditioning"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("preconditioning", ["edm", "vp", "ve", "iddpm"])
def test_every_preconditioning_is_the_identity_at_zero_noise(preconditioning):
    model = awake(Preconditioned(SKIPS, (1, 8, 8), preconditioning=preconditioning))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x, torch.tensor(0.0)), x)


@pytest.mark.parametrize("name", ["skip", "ncsn", "adm"])
def test_every_part_is_trained(name):
    configs = {
        "skip": SKIPS,
        "ncsn": SongUNetConfig(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), **NCSN),
        "adm": ADM(model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)),
    }
    model = awake(Preconditioned(configs[name], (1, 8, 8), classes=2)).train()
    model(torch.randn(8, 1, 8, 8), torch.tensor(1.0), torch.tensor([0, 1] * 4)).square().sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert float(p.grad.abs().max()) > 0, key


def test_an_augmentation_is_told_to_the_network():
    model = awake(Preconditioned(SongUNetConfig(**{**vars(SKIPS), "augment_dim": 3}), (1, 8, 8)))
    x, c = torch.randn(2, 1, 8, 8), torch.zeros(2)
    plain = model.net(x, c)
    assert torch.equal(model.net(x, c, None, torch.zeros(2, 3)), plain)
    assert not torch.allclose(model.net(x, c, None, torch.ones(2, 3)), plain)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (SongUNetConfig, {"model_channels": 6}),
        (SongUNetConfig, {"model_channels": True}),
        (SongUNetConfig, {"channel_mult": ()}),
        (SongUNetConfig, {"embedding_type": "zero"}),
        (SongUNetConfig, {"encoder_type": "none"}),
        (SongUNetConfig, {"decoder_type": "residual"}),
        (SongUNetConfig, {"resample_filter": (1, 2, 1)}),
        (SongUNetConfig, {"resample_filter": (1, math.nan)}),
        (SongUNetConfig, {"attn_resolutions": (0,)}),
        (ADM, {"num_blocks": 0}),
        (ADM, {"dropout": 1.0}),
        (ADM, {"label_dropout": math.nan}),
        (ADM, {"augment_dim": -1}),
    ],
)
def test_absurd_sizes_are_refused(kind, wrong):
    with pytest.raises(FanalError):
        kind(**wrong)


def test_what_does_not_fit_is_refused():
    with pytest.raises(FanalError, match="side divisible by 8"):
        Preconditioned(SongUNetConfig(), (3, 36, 36))
    with pytest.raises(FanalError, match=r"\(channels, side, side\)"):
        Preconditioned(ADM(), (3, 32, 64))
    for config, shape in ((UNetConfig(), (1, 32, 32)), (MLPConfig(), (2,))):
        with pytest.raises(FanalError, match="iddpm preconditioning needs"):
            Preconditioned(config, shape, preconditioning="iddpm")
    with pytest.raises(FanalError, match="heads do not divide"):
        Preconditioned(ADM(model_channels=224, channel_mult=(1,), attn_resolutions=(8,)), (3, 8, 8))
    with pytest.raises(FanalError, match="equal groups"):
        Preconditioned(ADM(model_channels=132, channel_mult=(1,)), (3, 8, 8))


def test_derivatives_of_every_kind_exist():
    model = make("EDMPrecond", TINY)
    model.load_state_dict(ours(tiny_state()))
    model = model.double().eval().requires_grad_(False)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v, sigma, h = torch.randn_like(x), torch.tensor(1.0, dtype=torch.float64), 1e-6
    _, forward = torch.func.jvp(lambda z: model(z, sigma), (x,), (v,))
    near = (model(x + h * v, sigma) - model(x - h * v, sigma)) / (2 * h)
    torch.testing.assert_close(forward, near, rtol=1e-5, atol=1e-7)
