"""Networks, their preconditioning, and the model folder."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from fanal.denoiser import Model
from fanal.errors import FanalError
from fanal.nets import MLPConfig, Preconditioned, UNet, UNetConfig, load_model, read_card, save_model
from fanal.nets.preconditioning import coefficients

SMALL = UNetConfig(widths=(8, 16), factor=1, embedding=8)


def awake(model, seed=0):
    """Give a fresh model weights of every kind, none zero, so that nothing hides behind the zero output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model.eval()


@pytest.fixture(params=["mlp", "unet", "conditional"])
def model(request):
    if request.param == "mlp":
        return awake(Preconditioned(MLPConfig(width=16, depth=2), (2,), sigma_data=1.5))
    classes = 3 if request.param == "conditional" else 0
    return awake(Preconditioned(SMALL, (1, 8, 8), sigma_data=0.7, classes=classes))


def test_a_fresh_network_is_the_best_linear_denoiser():
    # F = 0 leaves c_skip·x, the posterior mean of N(0, sd²) data.
    model = Preconditioned(SMALL, (1, 8, 8), sigma_data=0.7).double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sigma in (0.002, 0.7, 80.0):
        expected = 0.7**2 / (0.7**2 + sigma**2) * x
        torch.testing.assert_close(model(x, torch.tensor(sigma, dtype=torch.float64)), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 1.0, 30.0])
def test_inputs_and_targets_of_the_network_have_unit_variance(sigma):
    sd = 0.6
    generator = torch.Generator().manual_seed(1)
    # Data that are anything but Gaussian: the claim is about second moments.
    clean = sd * (2 * torch.randint(2, (200_000,), generator=generator).double() - 1)
    x = clean + sigma * torch.randn(200_000, generator=generator, dtype=torch.float64)
    c_skip, c_out, c_in, _ = coefficients(torch.tensor(sigma, dtype=torch.float64), sd)
    target = (clean - c_skip * x) / c_out
    for value in (c_in * x, target):
        spread = float((value**2).std()) / math.sqrt(len(value))
        assert abs(float((value**2).mean()) - 1) < 5 * spread + 1e-12
    # The least amplification of the network's errors: another c_skip needs a larger c_out.
    for other in (c_skip - 0.05, c_skip + 0.05):
        assert float((clean - other * x).square().mean()) > float((clean - c_skip * x).square().mean())


def test_one_noise_level_or_one_per_sample(model):
    x = torch.randn(5, *model.shape, generator=torch.Generator().manual_seed(2))
    assert isinstance(model, Model)
    for sigma in (0.01, 1.3, 50.0):
        one = model(x, torch.tensor(sigma, dtype=torch.float64))
        assert one.dtype == torch.float32
        assert torch.equal(one, model(x, torch.full((5,), sigma)))
    levels = torch.tensor([0.01, 0.1, 1.0, 5.0, 50.0])
    mixed = model(x, levels)
    for b in range(5):
        torch.testing.assert_close(mixed[b : b + 1], model(x[b : b + 1], levels[b]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed, model(x, levels.flip(0)), atol=1e-3)


def test_a_float64_state_keeps_its_precision_around_a_float32_network(model):
    x = torch.randn(3, *model.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sigma = torch.tensor(0.002, dtype=torch.float64)
    rough = model(x, sigma).detach()
    assert rough.dtype == torch.float64
    exact = model.double()(x, sigma).detach()
    # The network's rounding enters times c_out = 0.002: a float32 sum would err by 1e-7.
    assert float((rough - exact).abs().max()) < 1e-8
    assert float((rough - exact).abs().max()) > 0


def test_the_identity_at_sigma_zero(model):
    x = torch.randn(3, *model.shape)
    assert torch.equal(model(x, torch.tensor(0.0)), x)


def test_labels_matter_and_none_is_the_null_class():
    model = awake(Preconditioned(SMALL, (1, 8, 8), classes=3))
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor(1.0)
    null = model(x, sigma, torch.full((4,), 3))
    assert torch.equal(model(x, sigma), null)
    assert not torch.allclose(model(x, sigma, torch.tensor([0, 1, 2, 0])), null, atol=1e-3)
    for wrong in (torch.tensor([0, 1, 2, 4]), torch.tensor([-1, 0, 0, 0]), torch.zeros(4), torch.tensor([1])):
        with pytest.raises(FanalError, match="labels"):
            model(x, sigma, wrong)
    with pytest.raises(FanalError, match="without classes"):
        awake(Preconditioned(SMALL, (1, 8, 8)))(x, sigma, torch.zeros(4, dtype=torch.long))
    with pytest.raises(FanalError, match="sigma"):
        model(x, torch.ones(3))


def test_the_u_net_takes_any_size_it_can_halve():
    net = awake(UNet(UNetConfig(widths=(8, 16, 16), factor=2), (3, 32, 32)))
    assert net(torch.randn(2, 3, 24, 40), torch.zeros(2)).shape == (2, 3, 24, 40)
    with pytest.raises(FanalError, match="divisible by 8"):
        UNet(UNetConfig(), (1, 28, 28))
    with pytest.raises(FanalError, match="channels, height, width"):
        UNet(UNetConfig(), (2,))


def test_every_part_of_the_default_network_is_used():
    model = awake(Preconditioned(UNetConfig(), (1, 32, 32), classes=2)).train()
    assert 340_000 < sum(p.numel() for p in model.parameters()) < 380_000
    model(torch.randn(2, 1, 32, 32), torch.tensor(1.0), torch.tensor([0, 2])).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert float(p.grad.abs().max()) > 0, name


def test_second_derivatives_and_forward_mode_exist():
    model = awake(Preconditioned(SMALL, (1, 8, 8))).double().requires_grad_(False)
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    v = torch.randn_like(x)
    sigma = torch.tensor(1.0, dtype=torch.float64)
    _, forward = torch.func.jvp(lambda z: model(z, sigma), (x,), (v,))
    h = 1e-5
    torch.testing.assert_close(
        forward, (model(x + h * v, sigma) - model(x - h * v, sigma)) / (2 * h), rtol=1e-6, atol=1e-8
    )

    def curvature(z):
        return torch.func.grad(lambda y: (model(y, sigma) * v).sum())(z)

    _, second = torch.func.jvp(curvature, (x,), (v,))
    near = (curvature(x + h * v) - curvature(x - h * v)) / (2 * h)
    torch.testing.assert_close(second, near, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (UNetConfig, {"widths": (12,)}),
        (UNetConfig, {"widths": ()}),
        (UNetConfig, {"widths": (8,) * 9}),
        (UNetConfig, {"widths": (4096,)}),
        (UNetConfig, {"blocks": 0}),
        (UNetConfig, {"blocks": 1.5}),
        (UNetConfig, {"attention": 4}),
        (UNetConfig, {"heads": 3}),
        (UNetConfig, {"embedding": 7}),
        (UNetConfig, {"dropout": 1.0}),
        (UNetConfig, {"factor": True}),
        (MLPConfig, {"width": 10**9}),
        (MLPConfig, {"depth": 0}),
        (MLPConfig, {"frequencies": (math.nan,)}),
        (MLPConfig, {"embedding": 5}),
    ],
)
def test_absurd_sizes_are_refused(kind, wrong):
    with pytest.raises(FanalError):
        kind(**wrong)


def test_a_model_folder_round_trip(model, tmp_path):
    card = {"data": "hands32", "loss": [0.5, 0.25]}
    x = torch.randn(3, *model.shape)
    for m in (model, model.double()):
        save_model(tmp_path / "m", m, card)
        state = torch.get_rng_state()
        again = load_model(tmp_path / "m")
        assert torch.equal(state, torch.get_rng_state())
        assert read_card(tmp_path / "m") == card
        assert (again.config, again.shape, again.classes) == (m.config, m.shape, m.classes)
        assert (again.sigma_data, again.sigma_min, again.sigma_max) == (m.sigma_data, m.sigma_min, m.sigma_max)
        assert torch.equal(again(x, torch.tensor(0.9)), m(x, torch.tensor(0.9)))
        assert not again.training
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["model.json", "model.safetensors"]


def test_a_card_must_be_plain_json(tmp_path):
    model = Preconditioned(SMALL, (1, 8, 8))
    for card in ({"loss": math.nan}, {"x": object()}, {"x": "a" * 2**20}):
        with pytest.raises(FanalError):
            save_model(tmp_path / "m", model, card)
    assert not (tmp_path / "m").exists()


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "m", awake(Preconditioned(SMALL, (1, 8, 8))), {})
    return tmp_path / "m"


def rewrite(folder, **changes):
    path = folder / "model.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del content[key]
        else:
            content[key] = value
    path.write_text(json.dumps(content))


CONFIG = {"widths": [8, 16], "factor": 1, "blocks": 1, "attention": 1, "heads": 1, "embedding": 8, "dropout": 0.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "transformer"}, "unknown architecture"),
        ({"architecture": ["unet"]}, "unknown architecture"),
        ({"format": "other"}, "not a model description"),
        ({"extra": 1}, "extra"),
        ({"sigma_max": None}, "sigma_max"),
        ({"config": {**CONFIG, "widths": [8, 2**40]}}, "widths"),
        ({"config": {**CONFIG, "widths": 8}}, "widths"),
        ({"config": {**CONFIG, "widths": [2048] * 8, "blocks": 8}, "shape": [1, 128, 128]}, "parameters"),
        ({"config": {**CONFIG, "embedding": 10**12}}, "embedding"),
        ({"config": {**CONFIG, "depth": 3}}, "depth"),
        ({"config": {**CONFIG, "widths": [16, 16]}}, "shape"),
        ({"config": []}, "config"),
        ({"shape": [1, 2**40, 2**40]}, "shape"),
        ({"shape": [1, 8, "8"]}, "shape"),
        ({"shape": {}}, "shape"),
        ({"shape": [1, 9, 8]}, "divisible"),
        ({"classes": 10}, "does not fit"),
        ({"classes": 10**15}, "classes"),
        ({"sigma_data": "0.5"}, "sigma_data"),
        ({"sigma_data": math.nan}, "sigma_data"),
        ({"sigma_data": 10**400}, "sigma_data"),
        ({"sigma_min": 90.0}, "sigma_min"),
        ({"sha256": "0" * 64}, "sha256"),
        ({"card": "text"}, "card"),
    ],
)
def test_hostile_descriptions_are_refused(folder, changes, words):
    load_model(folder)
    rewrite(folder, **changes)
    with pytest.raises(FanalError, match=words):
        load_model(folder)


def test_hostile_files_in_place_of_the_description(folder):
    path = folder / "model.json"
    good = path.read_bytes()
    for text in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}", good + b" " * 2**20):
        path.write_bytes(text)
        with pytest.raises(FanalError):
            load_model(folder)
    path.unlink()
    with pytest.raises(FanalError, match="not a model folder"):
        load_model(folder)
    with pytest.raises(FanalError, match="not a model folder"):
        load_model(folder / "nowhere")


class Bomb:
    exploded = False

    def __reduce__(self):
        return (setattr, (Bomb, "exploded", True))


def test_hostile_weights_are_refused(folder):
    path = folder / "model.safetensors"
    good, tensors = path.read_bytes(), load_file(path)
    name = next(iter(tensors))
    pieces = {
        "truncated": good[:-10],
        "header only": good[:100],
        "empty": b"",
        "huge header": struct.pack("<Q", 2**60) + good[8:],
        "pickle": pickle.dumps(Bomb()),
        "padded": good + b"\0" * 2**22,
        "one bit": good[:-1] + bytes([good[-1] ^ 1]),
    }
    for content in pieces.values():
        path.write_bytes(content)
        with pytest.raises(FanalError, match="model.safetensors"):
            load_model(folder)
    assert not Bomb.exploded
    for changed in (
        {k: v for k, v in tensors.items() if k != name},
        {**tensors, "more": torch.zeros(1)},
        {**tensors, name: torch.zeros(3, 3)},
        {**tensors, name: tensors[name].to(torch.int32)},
        {**tensors, name: torch.full_like(tensors[name], math.nan)},
    ):
        save_file(changed, path)
        rewrite(folder, sha256=_digest(path))
        with pytest.raises(FanalError, match="model.safetensors"):
            load_model(folder)
    path.unlink()
    with pytest.raises(FanalError, match="cannot read"):
        load_model(folder)


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
