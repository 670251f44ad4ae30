"""Pretrained diffusers pipelines as denoisers `D(x, sigma)` in x-space.

A pipeline's network sees z and a time; fanal's x and sigma are turned into them, and its answer into D, by the table of
`fanal.adapters.predictions`:

| process | families | network's input | its time | D |
| --- | --- | --- | --- | --- |
| `vp` | DDPM, DDIM, DiT, Stable Diffusion 1, 2, XL | `x/√(1 + sigma²)` | `√((1 − ᾱ)/ᾱ) = sigma` | of epsilon, v or x0 |
| `flow` | Stable Diffusion 3, Flux | `x/(1 + sigma)` | `T·sigma/(1 + sigma)` | `(x − sigma·u)/(1 + sigma)` |
| `ve` | score-SDE VE | x | sigma | `x + sigma²·score` |

Everything else (text encoders, the VAE, the scheduler's own grid) is the pipeline's own, so that the same noise and the
same grid give the pipeline's own pictures.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fanal.adapters.pipeline_base import Condition, Family, Table, decoded
from fanal.adapters.pipeline_families import FAMILIES
from fanal.adapters.pipeline_files import Layout, fetch, read_layout
from fanal.adapters.pipeline_loading import build_pipeline, telling
from fanal.adapters.pipeline_schedulers import latents_of, native_sigmas, process_of, state_of
from fanal.adapters.predictions import denoised_of, input_of
from fanal.errors import FanalError, unknown_name

__all__ = ["PipelineNetwork", "PromptedPipeline", "load_pipeline"]

_DECODED = 2**20  # pixels that a VAE decodes at once
_ENCODED = 64  # prompts whose encodings are kept


class PipelineNetwork:
    """The network of a diffusers pipeline as `D(x, sigma, labels)`; the pipeline itself is left as it was.

    Attributes:
        pipeline: the pipeline object.
        process: how its network sees x and sigma, see `fanal.adapters.pipeline_schedulers.Process`.
        size: height and width of its pictures in pixels.
        shape: shape of one sample (pixels or latents), (C, H, W).
        sigma_min: noise level of the network's first time.
        sigma_max: noise level of its last time; infinite for flow matching and zero terminal SNR.
        classes: number of class labels; 0 without classes.
        null_label: whether a network with classes also knows no class.
        guidance_input: the guidance scale that a distilled network takes as an input (Flux, latent consistency).

    Args:
        pipeline: a pipeline object of one of the classes in `FAMILIES`.
        size: height and width in pixels; None: the pipeline's default.
        layout: the folder it came from, for its card.
        source: what to call it on its card.

    Raises:
        FanalError: it is no such pipeline, its network or scheduler is used in a way that is not read, or the size
            does not fit it.
    """

    def __init__(
        self,
        pipeline: Any,
        size: tuple[int, int] | None = None,
        *,
        layout: Layout | None = None,
        source: dict[str, str] | None = None,
    ) -> None:
        self.pipeline, self.layout = pipeline, layout
        self.family: Family = _family_of(pipeline)
        self.process = process_of(self.scheduler)
        self.source = source or {"object": type(pipeline).__name__}
        self.size = self.family.size(pipeline) if size is None else size
        self.shape = self.family.shape(pipeline, self.size)
        self.sigma_min, self.sigma_max = self.process.sigma_min, self.process.sigma_max
        self.classes, self.null_label = self.family.classes(pipeline)
        self.guidance_input = self.family.guidance

    @property
    def network(self) -> Any:
        """The module that denoises."""
        return getattr(self.pipeline, self.family.network)

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler; of a `FanalScheduler`, the one that it replaces."""
        own = self.pipeline.scheduler
        return own.base if type(own).__name__ == "FanalScheduler" else own

    def __call__(
        self, x: Float[Tensor, "b c h w"], sigma: Tensor, labels: Int[Tensor, " b"] | None = None, /
    ) -> Float[Tensor, "b c h w"]:
        """Return D(x, sigma) given class labels.

        The network runs in its own dtype; x, the conversion and D have the dtype of x.

        Args:
            x: samples in x-space; unit noise where sigma is infinite.
            sigma: noise level, 0-d or (B,); above `sigma_max` the network is asked at its last time.
            labels: one per sample; None or `classes`: no condition.

        Raises:
            FanalError: shapes or labels do not fit the network.
        """
        level = self._level(x, sigma)
        condition = self._condition(x, labels)
        z = input_of(x, level, self.process.kind)
        net = self.network
        kind = torch.float64 if net.dtype == torch.float64 else torch.float32
        time = self.process.time_of(level).to(kind).to(x.device).expand(len(x))
        out = self.family.predict(self.pipeline, z.to(net.dtype), time, condition)
        if out.shape[1] == 2 * x.shape[1]:  # the other half is a learned variance
            out = out[:, : x.shape[1]]
        return denoised_of(out.to(x.dtype), x, level, self.process.prediction)

    def _level(self, x: Tensor, sigma: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != tuple(self.shape):
            raise FanalError(f"samples of this pipeline have shape {tuple(self.shape)}, got {tuple(x.shape[1:])}")
        if sigma.ndim > 1 or (sigma.ndim == 1 and len(sigma) != len(x)):
            raise FanalError(f"sigma must be 0-d or have one entry per sample, got shape {tuple(sigma.shape)}")
        infinite = torch.isinf(sigma)
        if sigma.ndim and bool(infinite.any()):
            if not bool(infinite.all()):
                raise FanalError("sigma is infinite for some samples of a batch only: ask for them apart")
            return sigma[0]
        return sigma

    def _labels(self, x: Tensor, labels: Tensor | None) -> Tensor | None:
        """Labels in the network's numbers, (B,) int64; None for a network without classes."""
        if labels is None:
            labels = torch.full((len(x),), self.classes, dtype=torch.int64)
        if labels.shape != (len(x),) or labels.is_floating_point():
            raise FanalError(f"labels must be {len(x)} whole numbers, one per sample, got {tuple(labels.shape)}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= self.classes:
            raise FanalError(f"labels must be in [0, {self.classes}), got {int(labels.min())} to {int(labels.max())}")
        if self.classes and not self.null_label and bool((labels == self.classes).any()):
            raise FanalError("this network knows no unconditional sample: give a label for each")
        return labels.to(x.device)

    def _condition(self, x: Tensor, labels: Tensor | None) -> Condition:
        rows = self._labels(x, labels)
        return Condition(rows if self.classes else None, {}, self.guidance_input, self.size)

    def with_size(self, height: int, width: int) -> PipelineNetwork:
        """Return this network for pictures of another size, in pixels.

        Raises:
            FanalError: the network cannot make pictures of this size.
        """
        other = copy.copy(self)
        other.size, other.shape = (height, width), self.family.shape(self.pipeline, (height, width))
        return other

    def grid(self, steps: int, /) -> Float[Tensor, " n"]:
        """Return the sigmas that the pipeline's own scheduler steps through, float64, strictly decreasing.

        They begin at infinity where the pipeline starts from pure noise, and end at 0 or, with
        `set_alpha_to_one=False`, at the level of the network's first time.

        Args:
            steps: number of inference steps.

        Raises:
            FanalError: the scheduler cannot take as many steps.
        """
        if steps < 1:
            raise FanalError(f"steps must be at least 1, got {steps}")
        settings = self.family.settings(self.pipeline, self.shape, steps)
        return native_sigmas(self.scheduler, self.process, steps, settings)

    def state_of(self, x: Float[Tensor, "b c h w"], sigma: Tensor | float) -> Tensor:
        """Return what the pipeline's loop holds as `latents` at this x: x, `x/√(1 + sigma²)` or `x/(1 + sigma)`."""
        return self.family.pack(state_of(x, torch.as_tensor(sigma, dtype=torch.float64), self.process))

    def latents_of(self, x: Float[Tensor, "b c h w"], sigma: Tensor | float) -> Tensor:
        """Return what the pipeline takes as `latents=` to start at this x.

        That is unit noise up to a factor near 1: the loop's first state over the scheduler's `init_noise_sigma`.
        """
        spacing = self.scheduler.config.get("timestep_spacing", "")
        return self.family.pack(latents_of(x, torch.as_tensor(sigma, dtype=torch.float64), self.process, spacing))

    def decode(self, x: Float[Tensor, "b c h w"], /) -> Float[Tensor, "b 3 h w"]:
        """Return pictures in [−1, 1] of clean samples, float32.

        Latents are scaled as the VAE asks and decoded a few at a time; pixels are clamped; the score-SDE's pixels lie
        in [0, 1] and are moved.
        """
        vae = getattr(self.pipeline, "vae", None)
        if vae is None:
            pixels = 2 * x.float() - 1 if self.process.space == "sde" else x.float()
            return pixels.clamp(-1, 1)
        few = max(1, _DECODED // (self.size[0] * self.size[1]))
        return torch.cat([decoded(vae, part) for part in x.split(few)]).clamp(-1, 1)

    def to(self, device: torch.device | str) -> PipelineNetwork:
        """Move the pipeline's modules; returns this object."""
        self.pipeline.to(device)
        return self

    def card(self) -> dict[str, Any]:
        """Return what a user should know, as plain JSON values; an infinite sigma is the text `inf`."""
        net, config = self.network, self.scheduler.config
        count = sum(parameter.numel() for parameter in net.parameters())
        size = "x".join(map(str, self.shape))
        process, about = self.process, type(self.pipeline).__name__
        return {
            "summary": f"{about}: {type(net).__name__}, {size}, predicts {process.prediction}, {count:,} parameters",
            "source": {"format": "diffusers pipeline", **self.source},
            "prediction": process.prediction,
            "process": process.kind,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max if math.isfinite(self.sigma_max) else "inf",
            "size": list(self.size),
            "classes": self.classes,
            "parameters": count,
            "scheduler": {"class": type(self.scheduler).__name__, "clips": bool(config.get("clip_sample"))},
            "diffusers_version": self.layout.version if self.layout else "",
            "components": self._components(),
        }

    def _components(self) -> dict[str, Any]:
        if self.layout is None:
            parts = {name: type(part).__name__ for name, part in self.pipeline.components.items() if part is not None}
            return {name: {"class": kind} for name, kind in parts.items()}
        hashes = self.layout.hashes
        return {name: {"class": c.kind, "files": hashes[name]} for name, c in self.layout.components.items()}

    def fingerprint(self) -> str:
        """Return a hash of the files that were loaded, or of an object's weights and configurations."""
        digest = hashlib.sha256()
        if self.layout is not None:
            for name, files in sorted(self.layout.hashes.items()):
                digest.update(repr((name, sorted(files.items()))).encode())
            return digest.hexdigest()
        for name, part in sorted(self.pipeline.components.items()):
            digest.update(repr((name, type(part).__name__, dict(getattr(part, "config", None) or {}))).encode())
            if isinstance(part, torch.nn.Module):
                for key, tensor in part.state_dict().items():
                    digest.update(key.encode())
                    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class PromptedPipeline(PipelineNetwork):
    """The network of a text-to-image pipeline: labels are indices into the prompts that it was told.

    As it comes, it knows no prompt: `D(x, sigma)` is that of the pipeline's own empty negative prompt.

    Attributes:
        classes: number of prompts; as a label it means the negative prompt.
        prompts: the prompts.
        negative: the negative prompt.
    """

    def __init__(
        self,
        pipeline: Any,
        size: tuple[int, int] | None = None,
        *,
        layout: Layout | None = None,
        source: dict[str, str] | None = None,
    ) -> None:
        super().__init__(pipeline, size, layout=layout, source=source)
        self.prompts: tuple[str, ...] = ()
        self.negative = ""
        self.table: Table | None = None
        self._kept: dict[tuple[str, str, int | None], tuple[Table, Table]] = {}  # shared by copies: blocks ask again

    def with_prompts(
        self,
        prompts: Sequence[str],
        negative: str = "",
        *,
        guidance_input: float | None = None,
        max_sequence_length: int | None = None,
    ) -> PromptedPipeline:
        """Return the network that knows these prompts; the modules are shared.

        Args:
            prompts: texts; their indices are the labels.
            negative: what guidance leads away from. The empty text is what the pipeline takes when it is given none:
                the encoded empty text, or zeros (Stable Diffusion XL with `force_zeros_for_empty_prompt`).
            guidance_input: the guidance scale that a distilled network takes as an input; None: as it was, at first
                the default of the pipeline's call.
            max_sequence_length: tokens of the T5 encoder; None: the default of the pipeline's call.

        Raises:
            FanalError: a prompt is no text, or the text encoders cannot take it.
        """
        if isinstance(prompts, str) or not all(isinstance(text, str) for text in [*prompts, negative]):
            raise FanalError("prompts must be a list of texts, and negative a text")
        other = copy.copy(self)
        other.prompts, other.negative, other.classes = tuple(prompts), negative, len(prompts)
        if guidance_input is not None:
            other.guidance_input = guidance_input
        other.table = self._encoded(other.prompts, negative, max_sequence_length)
        return other

    @torch.no_grad()
    def _encoded(self, prompts: Sequence[str], negative: str, tokens: int | None) -> Table:
        try:
            pairs = [self._pair(text, negative, tokens) for text in prompts or ("",)]
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            raise FanalError(f"cannot encode the prompts: {type(error).__name__}: {error}"[:400]) from error
        rows = [told for told, _ in pairs] if prompts else []
        rows.append(pairs[0][1])
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _pair(self, text: str, negative: str, tokens: int | None) -> tuple[Table, Table]:
        """The encodings of a prompt and of what guidance leads away from; the last few are kept."""
        key = (text, negative, tokens)
        if key not in self._kept:
            if len(self._kept) >= _ENCODED:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = self.family.encode(self.pipeline, text, negative or None, tokens)
        return self._kept[key]

    def _condition(self, x: Tensor, labels: Tensor | None) -> Condition:
        if self.table is None:
            self.table = self._encoded((), "", None)
        index = self._labels(x, labels)
        rows = {name: values.to(x.device)[index] for name, values in self.table.items()}
        return Condition(None, rows, self.guidance_input, self.size)


def _family_of(pipeline: Any) -> Family:
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise unknown_name("pipeline class", name[:60], FAMILIES)
    return FAMILIES[name]


def load_pipeline(
    source: str | os.PathLike[str] | Any,
    *,
    allow_bin: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    size: tuple[int, int] | None = None,
) -> PipelineNetwork:
    """Load a diffusers pipeline as a denoiser; nothing that comes with it is run.

    The folder's `model_index.json` may name only known classes of diffusers and transformers; code, adapters and
    quantized weights are refused. Needed components are loaded one by one (no safety checker, no image processor).

    Args:
        source: a folder as `save_pretrained` writes it, `hub:ORG/NAME`, or a pipeline object.
        allow_bin: read `.bin` weights, with torch's weights-only loader, where there is no safetensors file.
        device: where the networks run.
        dtype: of the networks; float32 unless there is no room for it.
        revision: branch, tag or commit of a hub repository.
        variant: which weights, e.g. `fp16`; None: those without a variant.
        size: height and width in pixels; None: the pipeline's default.

    Returns:
        A `PromptedPipeline` for text-to-image pipelines, else a `PipelineNetwork`.

    Raises:
        FanalError: the source is no pipeline that is read, it is damaged, or something in it is refused.
    """
    layout, about = None, None
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        if name.startswith("hub:"):
            repository = name.removeprefix("hub:")
            folder = fetch(repository, allow_bin=allow_bin, revision=revision, variant=variant)
            about = {"hub": repository, "revision": folder.name}
        else:
            folder = Path(name)
            about = {"folder": folder.name}
        if not folder.is_dir():
            raise FanalError(f"there is no folder {name}; a pipeline from the hub is hub:ORG/NAME")
        layout = read_layout(folder, allow_bin=allow_bin, variant=variant)
        source = build_pipeline(layout, dtype=dtype, variant=variant)
    kind = PromptedPipeline if _family_of(source).text else PipelineNetwork
    with telling(f"{layout.folder if layout else 'the pipeline'} as a denoiser"):
        return kind(source, size, layout=layout, source=about).to(device)
