"""The linear probe: what it reads, that it finds what it was fitted on, and what it refuses."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fanal
from fanal.denoiser import Counted
from fanal.errors import FanalError
from fanal.files import read_tensors
from fanal.hallucination import activations
from fanal.hallucination import probe as probes
from fanal.hallucination.detectors import Detector, LastSlope
from fanal.hallucination.methods import METHODS, Settings
from fanal.hallucination.repair import watch
from fanal.nets import Preconditioned, UNetConfig
from fanal.schedules import polynomial
from fanal.seeding import noise
from fanal.solvers import Euler
from toys import blurred, tiny

SIGMAS, SEEDS = (0.5, 2.0), range(48)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Preconditioned(UNetConfig(widths=(8, 8), embedding=8), (1, 8, 8), sigma_data=0.5)
        for value in net.parameters():  # the last layers start at 0
            nn.init.normal_(value, std=0.3)
    return net.eval().requires_grad_(False)


def pictures(count=200):
    """Noise pictures, half of them with a bright square; the labels tell which."""
    x = noise((1, 8, 8), range(count), 0.3)
    wrong = torch.arange(count) % 2 == 0
    x[wrong, :, 2:6, 2:6] += 1.5
    return x, wrong


def fitted():
    x, wrong = pictures()
    return probes.fit(network(), x, wrong, sigmas=SIGMAS)


def test_a_probe_finds_what_the_activations_tell_apart_on_samples_it_has_not_seen():
    found = fitted()
    x, wrong = pictures(300)
    risk = found.probe.judge(network(), x[200:])
    assert fanal.metrics.auc(risk, wrong[200:]).value > 0.95
    assert found.auc.value > 0.95
    shuffled = wrong[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    # labels without meaning: cross-validated AUC has a standard error of 0.04 around 1/2
    assert abs(probes.fit(network(), x[:200], shuffled, sigmas=SIGMAS).auc.value - 0.5) < 0.16


def test_log_odds_are_odds():
    """A fitted logistic regression with a free intercept expects as many wrong samples as there were."""
    x, wrong = pictures()
    x, wrong = torch.cat([x[wrong][:30], x[~wrong]]), torch.arange(130) < 30
    risk = probes.fit(network(), x, wrong, sigmas=SIGMAS).probe.judge(network(), x)
    assert float(risk.sigmoid().mean()) == pytest.approx(30 / 130, abs=1e-3)


def test_what_is_read_is_the_prediction_and_the_channels():
    net, (x, _) = network(), pictures(5)
    layers = activations.layers_of(net)
    seen = activations.looks(net, x, SIGMAS, layers)
    kept = {}
    modules = dict(net.named_modules())
    hooks = [modules[n].register_forward_hook(lambda m, i, o, n=n: kept.__setitem__(n, o)) for n in layers]
    away = net(x, torch.tensor(0.5, dtype=torch.float64)) - x
    [hook.remove() for hook in hooks]
    assert torch.allclose(seen[:, 0], away.flatten(1).norm(dim=1).log().double())
    first = kept[layers[0]].flatten(2)
    width = first.shape[1]
    wanted = torch.cat([first.mean(2), first.amax(2), first.std(2, unbiased=False)], 1).double()
    assert torch.allclose(seen[:, 1 : 1 + 3 * width], wanted)
    assert seen.shape[1] == 2 * (1 + 3 * sum(k.shape[1] for k in kept.values()))
    assert not any(m._forward_hooks for m in net.modules())


def test_it_is_a_detector_whose_calls_are_counted_and_whose_risk_is_that_of_the_end():
    judge, model = fitted().probe, Counted(network())
    assert isinstance(judge, Detector)
    assert not judge.free
    grid = polynomial(5)
    outcome = watch(model, noise((1, 8, 8), SEEDS, 80.0), grid, Euler(), judge, SEEDS)
    assert (outcome.evaluations == 5 + len(SIGMAS)).all()
    assert model.evaluations == (5 + len(SIGMAS)) * len(SEEDS)
    assert torch.equal(outcome.risk, judge.judge(network(), outcome.x))
    assert outcome.per_step.shape == (5, len(SEEDS))
    assert (outcome.per_step[:-1] == 0).all()
    assert torch.equal(outcome.per_step[-1], outcome.risk)


def test_the_threshold_flags_the_share_of_the_calibration_samples():
    found = fitted()
    for flag in (0.1, 0.35, 0.6):
        above = float((found.risk > found.probe.threshold(flag)).double().mean())
        assert above == pytest.approx(flag, abs=0.011)


def test_a_file_holds_the_whole_probe(tmp_path):
    judge, (x, _) = fitted().probe, pictures(8)
    probes.write(tmp_path / "p.safetensors", judge, "how it was made")
    again = probes.read(tmp_path / "p.safetensors")
    assert torch.equal(again.judge(network(), x), judge.judge(network(), x))
    assert repr(again) == repr(judge)
    assert again.threshold(0.3) == judge.threshold(0.3)
    assert read_tensors(tmp_path / "p.safetensors")[1]["about"] == "how it was made"


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    probes.write(path, fitted().probe)
    tensors, header = read_tensors(path)
    bad = [
        ({**tensors, "scale": torch.zeros_like(tensors["scale"])}, header, "not positive"),
        ({**tensors, "weight": tensors["weight"][:-1].clone()}, header, "do not fit"),
        ({**tensors, "center": tensors["center"] * float("nan")}, header, "do not fit"),
        ({k: v for k, v in tensors.items() if k != "bias"}, header, "bias"),
        (tensors, {**header, "format": "other"}, "format"),
        (tensors, {k: v for k, v in header.items() if k != "layers"}, "layers"),
    ]
    for values, words, message in bad:
        save_file(values, str(path), words)
        with pytest.raises(FanalError, match=message):
            probes.read(path)
    path.write_bytes(b"no probe")
    with pytest.raises(FanalError, match="not a whole safetensors file"):
        probes.read(path)


def test_the_shipped_probes_belong_to_the_embedded_networks():
    for name in ("hands32", "shapes32"):
        found = probes.shipped(fanal.load(name))
        assert found is not None
        assert found.network == activations.digest(fanal.load(name))
    assert probes.shipped(network()) is None
    assert probes.shipped(blurred()) is None
    assert activations.digest(network(0)) != activations.digest(network(1))
    counting = nn.Module()
    counting.register_buffer("steps", torch.tensor(3.0))  # without axes
    before = activations.digest(counting)
    counting.register_buffer("steps", torch.tensor(4.0))
    assert activations.digest(counting) != before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hands32", "shapes32"])
def test_the_shipped_probes_are_what_their_command_writes(name, tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "probes.py"
    subprocess.run([sys.executable, str(script), name, "--out", str(tmp_path)], check=True)
    (again, said), (there, told) = (read_tensors(place / f"{name}.safetensors") for place in (tmp_path, probes.SHIPPED))
    assert said == told  # the number of wrong samples and the AUC among it
    assert again.keys() == there.keys()
    for key, value in again.items():
        # on another processor the sums round differently
        assert torch.allclose(value, there[key], rtol=1e-4, atol=1e-5), key


def test_a_hash_is_kept_until_a_weight_changes(monkeypatch):
    net = network()
    first, real = activations.digest(net), activations.hashlib.sha256
    monkeypatch.setattr(activations.hashlib, "sha256", None)  # nothing is hashed again
    assert activations.digest(Counted(net)) == first
    monkeypatch.setattr(activations.hashlib, "sha256", real)
    name, weight = next(iter(net.named_parameters()))
    other = weight.detach() + 1
    with torch.no_grad():
        weight.add_(1)
    changed = activations.digest(net)
    net.load_state_dict(network().state_dict())
    assert activations.digest(net) == first != changed
    owner = net.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], nn.Parameter(other))  # another tensor in its place
    assert activations.digest(net) == changed
    with torch.inference_mode():
        frozen = network()
        before = activations.digest(frozen)
        next(iter(frozen.parameters())).add_(1)
        assert activations.digest(frozen) == changed != before == first


def test_the_shipped_probes_know_real_from_broken_pictures():
    # Broken pictures are no samples of the network, so this is no AUC to report; only the direction must be right.
    for name, kind in (("hands32", "4 fingers"), ("shapes32", "blend")):
        data, model = fanal.datasets.DATASETS[name], fanal.load(name)
        found = probes.shipped(model)
        assert found is not None
        real, broken = (found.judge(model, x) for x in (data.data("held out", 64).x, data.broken(kind, 64)))
        risk, wrong = torch.cat([real, broken]), torch.arange(128) >= 64
        assert fanal.metrics.auc(risk, wrong).value > 0.8, name


def test_the_ladder_takes_a_probe_of_its_own_network_alone():
    grid, x = polynomial(4), noise((1, 8, 8), range(4), 80.0)
    climb = METHODS["ladder"](Settings(grid, LastSlope(), 0.0, probe=fitted().probe))
    assert climb(network(), x, range(4), 60).shape == x.shape
    with pytest.raises(FanalError, match="was fitted to the network .*fit one with"):
        climb(network(1), x, range(4), 60)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: activations.digest(blurred()), "Blurred is none"),
        (lambda: activations.layers_of(nn.Linear(2, 2)), "0 stages"),
        (lambda: activations.looks(network(), pictures(2)[0], SIGMAS, ["nowhere"]), "no layer 'nowhere'"),
        (lambda: probes.fit(network(), *pictures(6)), "at least 5 of each kind"),
        (lambda: fitted().probe.start(), "start it with the denoiser"),
        (lambda: fitted().probe.start(network()).risk(), "has seen no step"),
        (lambda: dataclasses.replace(fitted().probe, sigmas=(0.5,)).judge(network(), pictures(2)[0]), "the probe has"),
    ],
)
def test_what_makes_no_sense_is_refused(make, words):
    with pytest.raises(FanalError, match=words):
        make()


def test_under_guidance_the_condition_is_read(tmp_path):
    """Both halves of a guided batch go through the network; the activations are those of the conditional one."""
    tiny(tmp_path / "net", classes=3)
    x, layers = pictures(4)[0], activations.layers_of(fanal.load(str(tmp_path / "net")))
    told, guided = (fanal.load(str(tmp_path / "net"), labels=[0, 1, 2, 0], guidance=w) for w in (1.0, 2.5))
    one, both = (activations.looks(model, x, SIGMAS, layers) for model in (told, guided))
    width = one.shape[1] // len(SIGMAS)
    heads = [0, width]  # how far the prediction is from x; it is the guided one's
    rest = [i for i in range(one.shape[1]) if i not in heads]
    assert torch.allclose(both[:, rest], one[:, rest], atol=1e-5)
    assert not torch.allclose(both[:, heads], one[:, heads])


class Blocks(nn.Module):
    """Stages as pipelines have them: one that gives a tuple, one with tokens first, and none in a list."""

    def __init__(self, kind):
        super().__init__()
        self.stages = kind

    def forward(self, x, sigma):
        stages = self.stages.values() if isinstance(self.stages, nn.ModuleDict) else self.stages
        for stage in stages:
            out = stage(x)
        return x * 0.9 + 0 * out[0].sum()


class Pair(nn.Module):
    def forward(self, x):
        return (x, x.mean())


class Tokens(nn.Module):
    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


class Scalar(nn.Module):
    def forward(self, x):
        return x.flatten(1).mean(1)


def test_stages_of_other_kinds_of_networks_are_read():
    x = noise((3, 4, 4), range(5), 1.0)
    wanted = torch.cat([x.flatten(2).mean(2), x.flatten(2).amax(2), x.flatten(2).std(2, unbiased=False)], 1).double()
    for net in (Blocks(nn.ModuleList([Pair(), Tokens()])), Blocks(nn.ModuleDict({"a": Pair(), "b": Tokens()}))):
        seen = activations.looks(net, x, (1.0,), activations.layers_of(net))
        assert torch.allclose(seen[:, 1:], torch.cat([wanted, wanted], 1), atol=1e-6)
    with pytest.raises(FanalError, match=r"'stages.0' gives no channels"):
        activations.looks(Blocks(nn.ModuleList([Scalar()])), x, (1.0,), ("stages.0",))
