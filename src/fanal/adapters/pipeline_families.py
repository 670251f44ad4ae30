"""The kinds of pipeline that are read: how each shapes its samples, encodes its conditions and calls its network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from fanal.adapters.pipeline_base import (
    Condition,
    Family,
    Prompted,
    Silent,
    Table,
    multiple,
    pair,
    same_channels,
    vae_factor,
)
from fanal.errors import FanalError

__all__ = ["FAMILIES"]


@dataclass(frozen=True)
class Pixels(Silent):
    """UNet2DModel on pixels: DDPM, DDIM, score-SDE; with a class embedding where it was trained with one."""

    def size(self, pipeline: Any) -> tuple[int, int]:
        """Return the network's sample size."""
        return pair(pipeline.unet.config.sample_size)

    def shape(self, pipeline: Any, size: tuple[int, int]) -> tuple[int, ...]:
        """Return (channels, height, width); a side is halved by each block but the last."""
        config = pipeline.unet.config
        multiple(size, 2 ** (len(config.block_out_channels) - 1))
        return (same_channels(config), *size)

    def classes(self, pipeline: Any) -> tuple[int, bool]:
        """Return the size of the class embedding; UNet2DModel has no label for no class, an exported network has."""
        config = pipeline.unet.config
        if config.class_embed_type is not None:
            raise FanalError(f"a UNet2DModel with class_embed_type={config.class_embed_type!r} is not read")
        return int(config.num_class_embeds or 0), type(pipeline.unet).__name__ == "FanalUNet"

    def predict(self, pipeline: Any, z: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Call the U-Net; a learned time embedding takes whole times only."""
        unet = pipeline.unet
        if unet.config.time_embedding_type == "learned":
            time = time.round().long()
        return unet(z, time, class_labels=condition.labels, return_dict=False)[0]


@dataclass(frozen=True)
class ClassLatents(Silent):
    """DiT: latents, class labels, and one more label for no class."""

    network: str = "transformer"

    def size(self, pipeline: Any) -> tuple[int, int]:
        """Return the size that the position embedding was made for."""
        side = pipeline.transformer.config.sample_size * vae_factor(pipeline)
        return side, side

    def shape(self, pipeline: Any, size: tuple[int, int]) -> tuple[int, ...]:
        """Return (channels, sample_size, sample_size)."""
        if size != self.size(pipeline):
            raise FanalError(f"a DiT has one size, {self.size(pipeline)}, got {size}")
        side = pipeline.transformer.config.sample_size
        return same_channels(pipeline.transformer.config), side, side

    def classes(self, pipeline: Any) -> tuple[int, bool]:
        """Return the number of labels; the label after the last means no class."""
        return int(pipeline.transformer.config.num_embeds_ada_norm), True

    def predict(self, pipeline: Any, z: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Call the transformer."""
        return pipeline.transformer(z, timestep=time, class_labels=condition.labels, return_dict=False)[0]


def _unet_size(pipeline: Any) -> tuple[int, int]:
    """The sample size of a latent U-Net, in pixels."""
    high, wide = pair(pipeline.unet.config.sample_size)
    return high * vae_factor(pipeline), wide * vae_factor(pipeline)


def _unet_shape(pipeline: Any, size: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the latents of a U-Net that is told a text and nothing else."""
    config = pipeline.unet.config
    if config.class_embed_type is not None or config.encoder_hid_dim_type is not None:
        raise FanalError("a U-Net with class labels or image prompts beside the text is not read")
    return (same_channels(config), *multiple(size, vae_factor(pipeline)))


def _scale_embedding(pipeline: Any, z: Tensor, guidance: float) -> Tensor | None:
    """The embedded guidance scale of a distilled U-Net (latent consistency models)."""
    width = pipeline.unet.config.time_cond_proj_dim
    if width is None:
        return None
    scale = torch.full((len(z),), guidance - 1)
    return pipeline.get_guidance_scale_embedding(scale, embedding_dim=width).to(z)


@dataclass(frozen=True)
class StableDiffusion(Prompted):
    """Stable Diffusion 1.x and 2.x: one CLIP text encoder."""

    guidance: float = 7.5

    def size(self, pipeline: Any) -> tuple[int, int]:
        """Return the network's sample size in pixels."""
        return _unet_size(pipeline)

    def shape(self, pipeline: Any, size: tuple[int, int]) -> tuple[int, ...]:
        """Return (channels, height, width) of the latents."""
        return _unet_shape(pipeline, size)

    def encode(self, pipeline: Any, prompt: str, negative: str | None, tokens: int | None) -> tuple[Table, Table]:
        """Encode as the pipeline does; without a negative prompt it takes the empty one."""
        told, free = pipeline.encode_prompt(prompt, pipeline.unet.device, 1, True, negative)
        return {"text": told}, {"text": free}

    def predict(self, pipeline: Any, z: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Call the U-Net with the encoded prompt."""
        return pipeline.unet(
            z,
            time,
            encoder_hidden_states=condition.rows["text"],
            timestep_cond=_scale_embedding(pipeline, z, condition.guidance),
            return_dict=False,
        )[0]


@dataclass(frozen=True)
class StableDiffusionXL(Prompted):
    """Stable Diffusion XL: two text encoders, a pooled encoding, and the picture's size as time ids."""

    guidance: float = 5.0

    def size(self, pipeline: Any) -> tuple[int, int]:
        """Return the network's sample size in pixels."""
        return _unet_size(pipeline)

    def shape(self, pipeline: Any, size: tuple[int, int]) -> tuple[int, ...]:
        """Return (channels, height, width) of the latents."""
        return _unet_shape(pipeline, size)

    def encode(self, pipeline: Any, prompt: str, negative: str | None, tokens: int | None) -> tuple[Table, Table]:
        """Encode as the pipeline does; without a negative prompt it takes zeros where `force_zeros_…` says so."""
        told, free, pooled, free_pooled = pipeline.encode_prompt(
            prompt, device=pipeline.unet.device, negative_prompt=negative
        )
        return {"text": told, "pooled": pooled}, {"text": free, "pooled": free_pooled}

    def predict(self, pipeline: Any, z: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Call the U-Net; the time ids are (size, no crop, size), as the pipeline takes them by default."""
        text, pooled = condition.rows["text"], condition.rows["pooled"]
        ids = pipeline._get_add_time_ids(
            condition.size,
            (0, 0),
            condition.size,
            dtype=text.dtype,
            text_encoder_projection_dim=pooled.shape[-1],
        )
        return pipeline.unet(
            z,
            time,
            encoder_hidden_states=text,
            timestep_cond=_scale_embedding(pipeline, z, condition.guidance),
            added_cond_kwargs={"text_embeds": pooled, "time_ids": ids.to(z.device).expand(len(z), -1)},
            return_dict=False,
        )[0]


def _shift(scheduler: Any, tokens: int, longest: float) -> float:
    """`mu` of a resolution-dependent shift, linear in the number of image tokens."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", longest),
    )


@dataclass(frozen=True)
class StableDiffusion3(Prompted):
    """Stable Diffusion 3 and 3.5: two CLIP encoders and T5, flow matching."""

    network: str = "transformer"

    def size(self, pipeline: Any) -> tuple[int, int]:
        """Return the network's sample size in pixels."""
        side = pipeline.transformer.config.sample_size * vae_factor(pipeline)
        return side, side

    def shape(self, pipeline: Any, size: tuple[int, int]) -> tuple[int, ...]:
        """Return (channels, height, width) of the latents; they must fit patches and the position embedding."""
        config, factor = pipeline.transformer.config, vae_factor(pipeline)
        multiple(size, factor * config.patch_size)
        high, wide = multiple(size, factor)
        most = config.pos_embed_max_size * config.patch_size
        if max(high, wide) > most:
            raise FanalError(f"height and width are at most {most * factor}, got {size[0]} x {size[1]}")
        return same_channels(config), high, wide

    def encode(self, pipeline: Any, prompt: str, negative: str | None, tokens: int | None) -> tuple[Table, Table]:
        """Encode as the pipeline does; without a negative prompt it takes the empty one."""
        told, free, pooled, free_pooled = pipeline.encode_prompt(
            prompt,
            None,
            None,
            device=pipeline.transformer.device,
            negative_prompt=negative,
            max_sequence_length=256 if tokens is None else tokens,
        )
        return {"text": told, "pooled": pooled}, {"text": free, "pooled": free_pooled}

    def settings(self, pipeline: Any, shape: tuple[int, ...], steps: int) -> dict[str, Any]:
        """Give the shift that belongs to the resolution, where the scheduler asks for it."""
        if not pipeline.scheduler.config.get("use_dynamic_shifting"):
            return {}
        patch = pipeline.transformer.config.patch_size
        return {"mu": _shift(pipeline.scheduler, (shape[1] // patch) * (shape[2] // patch), 1.16)}

    def predict(self, pipeline: Any, z: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Call the transformer."""
        return pipeline.transformer(
            hidden_states=z,
            timestep=time,
            encoder_hidden_states=condition.rows["text"],
            pooled_projections=condition.rows["pooled"],
            return_dict=False,
        )[0]


@dataclass(frozen=True)
class Flux(Prompted):
    """Flux: CLIP and T5, latents packed into 2 x 2 patches, flow matching with a shift by resolution."""

    network: str = "transformer"
    guidance: float = 3.5

    def size(self, pipeline: Any) -> tuple[int, int]:
        """Return the pipeline's default size in pixels."""
        side = pipeline.default_sample_size * vae_factor(pipeline)
        return side, side

    def shape(self, pipeline: Any, size: tuple[int, int]) -> tuple[int, ...]:
        """Return (channels, height, width) of the latents before packing."""
        high, wide = multiple(size, 2 * vae_factor(pipeline))
        return same_channels(pipeline.transformer.config) // 4, 2 * high, 2 * wide

    def encode(self, pipeline: Any, prompt: str, negative: str | None, tokens: int | None) -> tuple[Table, Table]:
        """Encode as the pipeline does; no negative prompt is the empty one."""

        def one(text: str) -> Table:
            told, pooled, _ = pipeline.encode_prompt(
                text,
                None,
                device=pipeline.transformer.device,
                max_sequence_length=512 if tokens is None else tokens,
            )
            return {"text": told, "pooled": pooled}

        return one(prompt), one(negative or "")

    def settings(self, pipeline: Any, shape: tuple[int, ...], steps: int) -> dict[str, Any]:
        """Give the times 1 … 1/steps and the shift that belongs to the resolution."""
        import numpy as np

        flows = pipeline.scheduler.config.get("use_flow_sigmas")
        times = None if flows else np.linspace(1.0, 1 / steps, steps)
        return {"sigmas": times, "mu": _shift(pipeline.scheduler, (shape[1] // 2) * (shape[2] // 2), 1.15)}

    def pack(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n p"]:
        """Return z as a sequence of 2 x 2 patches."""
        from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

        return FluxPipeline._pack_latents(z, *z.shape)

    def predict(self, pipeline: Any, z: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Call the transformer; it takes time in [0, 1]."""
        network, high, wide = pipeline.transformer, z.shape[2], z.shape[3]
        text = condition.rows["text"]
        embedded = (
            torch.full((len(z),), condition.guidance, device=z.device) if network.config.guidance_embeds else None
        )
        out = network(
            hidden_states=self.pack(z),
            timestep=time / 1000,
            guidance=embedded,
            pooled_projections=condition.rows["pooled"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=z.device, dtype=text.dtype),
            img_ids=pipeline._prepare_latent_image_ids(len(z), high // 2, wide // 2, z.device, text.dtype),
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(out, high, wide, 1)


FAMILIES: dict[str, Family] = cast(
    "dict[str, Family]",
    {
        **dict.fromkeys(("DDPMPipeline", "DDIMPipeline", "ScoreSdeVePipeline"), Pixels()),
        "DiTPipeline": ClassLatents(),
        "StableDiffusionPipeline": StableDiffusion(),
        "StableDiffusionXLPipeline": StableDiffusionXL(),
        "StableDiffusion3Pipeline": StableDiffusion3(),
        "FluxPipeline": Flux(),
    },
)
"""The kinds of pipeline that are read, by the name of diffusers' class."""
