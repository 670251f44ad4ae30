"""State dicts with the names of guided-diffusion and consistency-models, and what such a network should answer.

`answer` follows the published description (Dhariwal & Nichol 2021, section 3 and appendix) on the tensors by name. It
shares no code with fanal; `renamed` gives the weights of a diffusers network the same names.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

SMALL = {"base": 32, "mults": (1, 2), "blocks": 1, "attends": (1,), "classes": 3}
SETTINGS = "size=8,heads=2,order=legacy,schedule=linear"


def _block(name, before, after, embedding, scale_shift):
    found = {f"{name}.in_layers.0": (before,), f"{name}.in_layers.2": (after, before, 3, 3)}
    found |= {f"{name}.emb_layers.1": ((1 + scale_shift) * after, embedding)}
    found |= {f"{name}.out_layers.0": (after,), f"{name}.out_layers.3": (after, after, 3, 3)}
    return found | ({f"{name}.skip_connection": (after, before, 1, 1)} if before != after else {})


def _attention(name, width, axes):
    ones = (1,) * axes
    return {
        f"{name}.norm": (width,),
        f"{name}.qkv": (3 * width, width, *ones),
        f"{name}.proj_out": (width, width, *ones),
    }


def shapes(base, mults, blocks, attends, classes=0, channels=3, outputs=3, scale_shift=True, axes=1):
    """Name → shape of every tensor; `axes` is that of the attention's convolutions (1: guided-diffusion)."""
    embedding, width = 4 * base, int(base * mults[0])
    layers = {"time_embed.0": (embedding, base), "time_embed.2": (embedding, embedding)}
    layers |= {"input_blocks.0.0": (width, channels, 3, 3)}
    skips, at = [width], 1
    for level, mult in enumerate(mults):
        for _ in range(blocks):
            layers |= _block(f"input_blocks.{at}.0", width, int(base * mult), embedding, scale_shift)
            width = int(base * mult)
            layers |= _attention(f"input_blocks.{at}.1", width, axes) if level in attends else {}
            skips.append(width)
            at += 1
        if level < len(mults) - 1:
            layers |= _block(f"input_blocks.{at}.0", width, width, embedding, scale_shift)
            skips.append(width)
            at += 1
    for place in (0, 2):
        layers |= _block(f"middle_block.{place}", width, width, embedding, scale_shift)
    layers |= _attention("middle_block.1", width, axes)
    at = 0
    for level, mult in reversed(list(enumerate(mults))):
        for i in range(blocks + 1):
            after = int(base * mult)
            layers |= _block(f"output_blocks.{at}.0", width + skips.pop(), after, embedding, scale_shift)
            layers |= _attention(f"output_blocks.{at}.1", after, axes) if level in attends else {}
            width = after
            if level and i == blocks:
                layers |= _block(f"output_blocks.{at}.{1 + (level in attends)}", width, width, embedding, scale_shift)
            at += 1
    layers |= {"out.0": (width,), "out.2": (outputs, width, 3, 3)}
    found = {f"{name}.weight": shape for name, shape in layers.items()}
    found |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return found | ({"label_emb.weight": (classes, embedding)} if classes else {})


def state(seed=0, **sizes):
    """Random weights that keep activations near one."""
    return awake({name: torch.empty(shape) for name, shape in shapes(**SMALL | sizes).items()}, seed)


def awake(tensors, seed=0):
    """Fill tensors with noise of a size that fits their fan-in; normalizations scale by about one."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in tensors.items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1 and not name.startswith("label_emb"):
            found[name] = noise / math.sqrt(math.prod(value.shape[1:]))
        else:
            norm = name.endswith(("in_layers.0.weight", "out_layers.0.weight", "norm.weight", "out.0.weight"))
            found[name] = 0.2 * noise + float(norm)
    return found


def save(path, tensors, **options):
    torch.save(tensors, path, **options)
    return path


def _linear(w, name, h):
    return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _norm(w, name, h):
    return F.group_norm(h, 32, w[f"{name}.weight"], w[f"{name}.bias"])


def _resblock(w, name, h, told, resample):
    x = h
    h = F.silu(_norm(w, f"{name}.in_layers.0", h))
    if resample == "down":
        x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
    elif resample == "up":
        x, h = (value.repeat_interleave(2, 2).repeat_interleave(2, 3) for value in (x, h))
    h = F.conv2d(h, w[f"{name}.in_layers.2.weight"], w[f"{name}.in_layers.2.bias"], padding=1)
    told = _linear(w, f"{name}.emb_layers.1", F.silu(told))[:, :, None, None]
    if told.shape[1] == 2 * h.shape[1]:
        scale, shift = told[:, : h.shape[1]], told[:, h.shape[1] :]
        h = _norm(w, f"{name}.out_layers.0", h) * (1 + scale) + shift
    else:
        h = _norm(w, f"{name}.out_layers.0", h + told)
    h = F.conv2d(F.silu(h), w[f"{name}.out_layers.3.weight"], w[f"{name}.out_layers.3.bias"], padding=1)
    if f"{name}.skip_connection.weight" in w:
        x = F.conv2d(x, w[f"{name}.skip_connection.weight"], w[f"{name}.skip_connection.bias"])
    return x + h


def _attend(w, name, h, heads, order):
    batch, width, high, wide = h.shape
    flat = _norm(w, f"{name}.norm", h).flatten(2)
    qkv = torch.einsum("oc,bcl->bol", w[f"{name}.qkv.weight"].flatten(1), flat) + w[f"{name}.qkv.bias"][:, None]
    size = width // heads
    outs = []
    for head in range(heads):  # written out head by head, so that the order cannot be mistaken
        if order == "legacy":
            q, k, v = qkv[:, 3 * size * head : 3 * size * (head + 1)].split(size, dim=1)
        else:
            q, k, v = (qkv[:, part * width + size * head : part * width + size * (head + 1)] for part in range(3))
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(size), dim=2)
        outs.append(torch.einsum("bts,bcs->bct", weights, v))
    joined = torch.cat(outs, dim=1)
    out = torch.einsum("oc,bcl->bol", w[f"{name}.proj_out.weight"].flatten(1), joined)
    return h + (out + w[f"{name}.proj_out.bias"][:, None]).reshape(batch, width, high, wide)


def answer(w, x, times, labels=None, *, heads=None, head_channels=None, order="legacy"):
    """What the network with these weights answers, all of its output channels."""

    def attend(name, h):
        return _attend(w, name, h, heads or h.shape[1] // head_channels, order)

    half = w["time_embed.0.weight"].shape[1] // 2
    angle = times[:, None] * torch.exp(-math.log(10_000) * torch.arange(half, dtype=times.dtype) / half)
    told = _linear(w, "time_embed.2", F.silu(_linear(w, "time_embed.0", torch.cat([angle.cos(), angle.sin()], 1))))
    if "label_emb.weight" in w:
        told = told + w["label_emb.weight"][labels]
    ups = sum(f"output_blocks.{i}.{k}.in_layers.0.weight" in w for i in range(99) for k in (1, 2))
    count = sum(f"output_blocks.{i}.0.in_layers.0.weight" in w for i in range(99))
    per = count // (ups + 1)
    h = F.conv2d(x, w["input_blocks.0.0.weight"], w["input_blocks.0.0.bias"], padding=1)
    skips = [h]
    for i in range(1, count):
        h = _resblock(w, f"input_blocks.{i}.0", h, told, "" if i % per else "down")
        h = attend(f"input_blocks.{i}.1", h) if f"input_blocks.{i}.1.qkv.weight" in w else h
        skips.append(h)
    h = attend("middle_block.1", _resblock(w, "middle_block.0", h, told, ""))
    h = _resblock(w, "middle_block.2", h, told, "")
    for i in range(count):
        h = _resblock(w, f"output_blocks.{i}.0", torch.cat([h, skips.pop()], 1), told, "")
        h = attend(f"output_blocks.{i}.1", h) if f"output_blocks.{i}.1.qkv.weight" in w else h
        for place in (1, 2):
            if f"output_blocks.{i}.{place}.in_layers.0.weight" in w:
                h = _resblock(w, f"output_blocks.{i}.{place}", h, told, "up")
    h = F.silu(_norm(w, "out.0", h))
    return F.conv2d(h, w["out.2.weight"], w["out.2.bias"], padding=1)


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def renamed(net):
    """The weights of a diffusers UNet2DModel under the names of consistency-models."""
    homes, at = dict(_OUTER), 1
    for level, down in enumerate(net.down_blocks):
        for j in range(len(down.resnets)):
            homes[f"down_blocks.{level}.resnets.{j}"] = f"input_blocks.{at}.0"
            homes[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{at}.1"
            at += 1
        homes[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{at}.0"
        at += 1
    at = 0
    for level, up in enumerate(net.up_blocks):
        for j in range(len(up.resnets)):
            homes[f"up_blocks.{level}.resnets.{j}"] = f"output_blocks.{at}.0"
            homes[f"up_blocks.{level}.attentions.{j}"] = f"output_blocks.{at}.1"
            at += 1
        place = 1 + hasattr(up, "attentions")
        homes[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{at - 1}.{place}"
    return _rename(net.state_dict(), homes)


def _rename(weights, homes):
    found = {}
    for name, value in weights.items():
        home = next(home for home in sorted(homes, key=len, reverse=True) if name.startswith(f"{home}."))
        inner, _, last = name.removeprefix(f"{home}.").rpartition(".")
        if inner in _RESNET:
            found[f"{homes[home]}.{_RESNET[inner]}.{last}"] = value
        elif inner == "to_q":
            parts = [weights[f"{home}.to_{letter}.{last}"] for letter in "qkv"]
            found[f"{homes[home]}.qkv.{last}"] = _wide(torch.cat(parts))
        elif inner == "to_out.0":
            found[f"{homes[home]}.proj_out.{last}"] = _wide(value)
        elif inner not in ("to_k", "to_v"):
            found[f"{homes[home]}.{'norm.' if inner else ''}{last}"] = value
    return found


def _wide(value):
    return value[:, :, None, None] if value.ndim == 2 else value
