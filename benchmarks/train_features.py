"""Train the small feature network that `fanal eval --features own` uses.

It learns to tell what the package can draw: hands and shapes, right or broken in 20 ways, and digits; which shapes a
right picture holds; and what the verifiers measure. Half of the training pictures get mild noise and blur, as samples
have. The features are the last layer before the three heads, which are thrown away.

    OMP_NUM_THREADS=1 python benchmarks/train_features.py --out src/fanal/metrics/weights/features32.safetensors

Writes the weights and, beside them, a card with the settings, the held-out figures and the weights' sha256.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from fanal import metrics
from fanal.datasets import get
from fanal.files import write_json, write_tensors
from fanal.metrics.features import gray_images
from fanal.metrics.network import FEATURES, SIDE, FeatureNet
from fanal.runs import versions

MEASURES = {
    "hands32": ("fingers", "palm_radius", "area", "parts", "finger_length", "narrowest", "widest"),
    "shapes32": ("shapes", "triangles", "squares", "pentagons", "area", "fit", "faint"),
}
DIGITS = [f"digit {d}" for d in range(10)]
BLANK = "blank"  # an empty picture is the same in both sets
KINDS = [
    *(f"{name} {kind}" for name in MEASURES for kind in ("ok", *get(name).broken_kinds) if kind != BLANK),
    *DIGITS,
    BLANK,
]
MOST = sum(map(len, MEASURES.values()))


@dataclasses.dataclass(frozen=True, eq=False)
class Lesson:
    """Pictures and what is to be said about them; -1 and NaN stand for "nothing"."""

    x: Tensor
    kind: Tensor
    content: Tensor
    measured: Tensor

    def join(self, other: Lesson) -> Lesson:
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return Lesson(*(torch.cat(pair) for pair in pairs))


def judged(name: str, split: str, right: int, broken: int, seed: int) -> Lesson:
    """Right and broken samples of a set that has a verifier."""
    dataset = get(name)
    real = dataset.data(split, right, seed)
    parts, kinds = [real.x], [torch.full((right,), KINDS.index(f"{name} ok"))]
    for kind in dataset.broken_kinds:
        parts.append(dataset.broken(kind, broken, seed))
        kinds.append(torch.full((broken,), KINDS.index(kind if kind == BLANK else f"{name} {kind}")))
    x = torch.cat(parts)
    content = torch.full((len(x),), -1)
    if real.labels is not None:
        content[:right] = real.labels
    measured = torch.full((len(x), MOST), torch.nan)
    start = 0 if name == "hands32" else len(MEASURES["hands32"])
    seen = dataset.measure(x)
    for column, what in enumerate(MEASURES[name], start):
        measured[:, column] = seen[what].float()
    return Lesson(gray_images(x), torch.cat(kinds), content, measured)


def digits(split: str, repeats: int) -> Lesson:
    """The digits of a split, some times over: there are few."""
    data = get("digits8").data(split)
    x, labels = gray_images(data.x).repeat(repeats, 1, 1, 1), data.labels.repeat(repeats)
    return Lesson(x, labels + KINDS.index(DIGITS[0]), torch.full((len(x),), -1), torch.full((len(x), MOST), torch.nan))


def lessons(split: str, right: int, broken: int, repeats: int, seed: int) -> Lesson:
    hands, shapes = (judged(name, split, right, broken, seed) for name in MEASURES)
    return hands.join(shapes).join(digits(split, repeats))


def worn(x: Tensor, random: torch.Generator) -> Tensor:
    """Blur and noise every second picture mildly, and shift the batch by up to two pixels."""
    n = len(x)
    dx, dy = (int(torch.randint(-2, 3, (1,), generator=random)) for _ in range(2))
    x = F.pad(x, (2, 2, 2, 2), value=-1.0)[:, :, 2 + dy : 2 + dy + SIDE, 2 + dx : 2 + dx + SIDE]
    strength = 0.5 * torch.rand(n, 1, 1, 1, generator=random) * (torch.rand(n, 1, 1, 1, generator=random) < 0.5)
    x = x + strength * (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x)
    level = 0.08 * torch.rand(n, 1, 1, 1, generator=random) * (torch.rand(n, 1, 1, 1, generator=random) < 0.5)
    return (x + level * torch.randn(x.shape, generator=random)).clamp(-1, 1)


class Heads(nn.Module):
    """What the features must be good for while the network learns."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = nn.Linear(FEATURES, len(KINDS))
        self.content = nn.Linear(FEATURES, 7)
        self.measured = nn.Linear(FEATURES, MOST)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.silu(features)
        return self.kind(h), self.content(h), self.measured(h)


def loss_of(told: tuple[Tensor, Tensor, Tensor], kind: Tensor, content: Tensor, measured: Tensor) -> Tensor:
    known = ~measured.isnan()
    off = torch.where(known, told[2] - measured.nan_to_num(), 0.0).square().sum() / known.sum().clamp_min(1)
    return (
        F.cross_entropy(told[0], kind)
        + F.cross_entropy(told[1], content, ignore_index=-1, reduction="sum") / (content >= 0).sum().clamp_min(1)
        + off
    )


def judge(net: FeatureNet, heads: Heads, held: Lesson, mean: Tensor, std: Tensor) -> dict:
    """Held-out accuracy of the kinds, of the contents, and the share of variance explained of the measures."""
    with torch.no_grad():
        parts = [heads(net(x)) for x in held.x.split(256)]
    kind, content, measured = (torch.cat([part[i] for part in parts]) for i in range(3))
    known = held.content >= 0
    figures = {
        "kinds": metrics.rate(kind.argmax(1) == held.kind),
        "contents": metrics.rate(content.argmax(1)[known] == held.content[known]),
    }
    for name in [*MEASURES, "digit", BLANK]:
        rows = torch.tensor([KINDS[k].startswith(name) for k in held.kind.tolist()])
        figures[f"kinds of {name}"] = metrics.rate(kind.argmax(1)[rows] == held.kind[rows])
    wanted = (held.measured - mean) / std
    seen = ~wanted.isnan()
    left = torch.where(seen, measured - wanted.nan_to_num(), 0.0).square().sum(0) / seen.sum(0)
    spread = torch.tensor([float(column[ok].var()) for column, ok in zip(wanted.T, seen.T, strict=True)])
    names = [what for name in MEASURES for what in (f"{name} {m}" for m in MEASURES[name])]
    explained = dict(zip(names, (1 - left / spread).tolist(), strict=True))
    return {name: dataclasses.asdict(found) for name, found in figures.items()} | {
        "variance explained": {name: round(value, 4) for name, value in explained.items()}
    }


@torch.no_grad()
def standardize(net: FeatureNet, x: Tensor) -> None:
    """Give each feature mean 0 and standard deviation 1 over the training pictures, by its own weights."""
    features = torch.cat([net(part) for part in x.split(256)]).double()
    mean, std = features.mean(0), features.std(0)
    net.last.weight.copy_(net.last.weight.double() / std[:, None])
    net.last.bias.copy_((net.last.bias.double() - mean) / std)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("features32.safetensors"))
    parser.add_argument("--iterations", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    begin = time.process_time()  # the core's time, on a machine that may be busy with something else
    lesson = lessons("train", 6000, 1200, 4, options.seed)
    held = lessons("held out", 1000, 100, 1, options.seed + 1)
    flat = lesson.measured
    mean = torch.stack([column[~column.isnan()].mean() for column in flat.T])
    std = torch.stack([column[~column.isnan()].std() for column in flat.T])
    console.print(f"{len(lesson.x)} pictures of {len(KINDS)} kinds, drawn in {time.process_time() - begin:.0f} s")

    net, heads = FeatureNet(), Heads()
    weights = [*net.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.iterations)
    random = torch.Generator().manual_seed(options.seed)
    recent: list[float] = []
    for i in range(options.iterations):
        rows = torch.randint(len(lesson.x), (options.batch,), generator=random)
        told = heads(net(worn(lesson.x[rows], random)))
        loss = loss_of(told, lesson.kind[rows], lesson.content[rows], (lesson.measured[rows] - mean) / std)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        recent.append(float(loss.detach()))
        if (i + 1) % 500 == 0:
            seconds = time.process_time() - begin
            console.print(f"step {i + 1}: loss {sum(recent[-500:]) / 500:.3f}, {seconds:.0f} s")
    net.eval()
    held_out = judge(net, heads, held, mean, std)
    standardize(net, lesson.x)
    seconds = time.process_time() - begin

    write_tensors(options.out, net.state_dict())
    card = {
        "name": "fanal-features32",
        "sha256": hashlib.sha256(options.out.read_bytes()).hexdigest(),
        "parameters": sum(weight.numel() for weight in net.parameters()),
        "data": {"train": len(lesson.x), "held out": len(held.x), "kinds": KINDS},
        "training": {
            "script": "benchmarks/train_features.py",
            "iterations": options.iterations,
            "batch": options.batch,
            "seed": options.seed,
            "held_out_seed": options.seed + 1,
            "cpu_seconds": round(seconds),
            "threads": 1,
            "last_loss": round(sum(recent[-500:]) / len(recent[-500:]), 4),
        },
        "held_out": held_out,
        "versions": versions(),
        "license": "Apache-2.0",
    }
    write_json(options.out.with_suffix(".json"), card)
    console.print_json(data=card["held_out"])


if __name__ == "__main__":
    main()
