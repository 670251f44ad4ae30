"""fanal's models as diffusers pipelines: a folder that a stock `DDIMPipeline.from_pretrained` loads.

    from fanal.adapters.export import export_pipeline

    export_pipeline("hands32", "hands32-diffusers")
    pipe = diffusers.DDIMPipeline.from_pretrained("hands32-diffusers")  # where this module is imported; no code in it
    pipe(batch_size=4, num_inference_steps=40)

Importing this module imports diffusers; `import fanal` does not import this module.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin as ConfigMixin  # pipelines look the bases up in this module
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from fanal.adapters.predictions import Timesteps, output_of, x_of
from fanal.denoiser import Denoiser, network_of
from fanal.errors import FanalError, reason
from fanal.files import check_folder, read_json, write_atomically
from fanal.loading import card as card_of
from fanal.loading import open_network
from fanal.nets import Preconditioned
from fanal.nets.folder import config_from_dict, config_to_dict
from fanal.schedules import polynomial

__all__ = ["FanalUNet", "beta_table", "export_pipeline"]

_DERIVED = ("out_channels", "class_embed_type", "time_embedding_type", "block_out_channels")
_UNET = ["fanal.adapters.export", "FanalUNet"]
_LOWEST = 0.002  # below it, ᾱ in float32 cannot tell one time from the next


def beta_table(sigma_min: float, sigma_max: float, count: int = 1000) -> list[float]:
    """Return the betas of a variance-preserving process whose times run through a range of sigma as Karras' grid does.

        sigma_t = (sigma_min^(1/7) + t/(count−1)·(sigma_max^(1/7) − sigma_min^(1/7)))^7
        ᾱ_t = 1/(1 + sigma_t²),   beta_t = 1 − ᾱ_t/ᾱ_{t−1},   ᾱ_{−1} = 1

    Evenly spaced times are then nodes of Karras' curve with rho = 7 (Karras et al. 2022, eq. 5).

    Args:
        sigma_min: noise level of time 0; 0.002 if smaller.
        sigma_max: noise level of the last time.
        count: number of times.

    Raises:
        FanalError: the range is empty.
    """
    sigmas = polynomial(count - 1, max(sigma_min, _LOWEST), sigma_max, zero=False).flip(0)
    alphas = torch.cat([sigmas.new_ones(1), 1 / (1 + sigmas**2)])
    return (1 - alphas[1:] / alphas[:-1]).tolist()


class FanalUNet(ModelMixin, ConfigMixin):
    """A denoiser of fanal as a diffusers U-Net: it answers the noise ε at a time of a variance-preserving process.

    With sigma the noise level of the time and x = z·√(1 + sigma²): `ε = (x − D(x, sigma))/sigma`. D is computed in
    float32 at least. Without class labels, D is unconditional.

    Args:
        network: the network, as `fanal.nets.folder.config_to_dict` describes it.
        in_channels: channels of an image.
        sample_size: side of an image, or height and width.
        num_class_embeds: number of classes; None without classes.
        preconditioning: from network to denoiser, see `fanal.nets.Preconditioned`.
        sigma_data: as there.
        sigma_min: noise level of time 0; 0.002 if smaller.
        sigma_max: noise level of the last time.
        num_train_timesteps: number of times, see `beta_table`.

    Raises:
        FanalError: the configuration describes no network.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        network: Mapping[str, Any],
        in_channels: int,
        sample_size: int | Sequence[int],
        num_class_embeds: int | None = None,
        preconditioning: str = "edm",
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        size = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        if not isinstance(num_train_timesteps, int) or not 2 <= num_train_timesteps <= 10_000:
            raise FanalError(f"num_train_timesteps must be in [2, 10000], got {num_train_timesteps!r:.40}")
        self.model = Preconditioned(
            config_from_dict(dict(network)),
            (in_channels, *size),
            sigma_data=sigma_data,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            classes=num_class_embeds or 0,
            preconditioning=preconditioning,
        )
        with torch.device("cpu"):  # also where the network itself is built without memory
            self.betas = beta_table(sigma_min, sigma_max, num_train_timesteps)
            # The scheduler's own arithmetic, so that both mean the same sigma by a time, float32 rounding included.
            alphas = DDIMScheduler(num_train_timesteps, trained_betas=self.betas).alphas_cumprod
            self.times = Timesteps.of_alphas(alphas)
        # What programs read off a UNet2DModel:
        widths = network.get("widths") or [network["model_channels"] * m for m in network["channel_mult"]]
        self.register_to_config(
            out_channels=in_channels,
            class_embed_type=None,
            time_embedding_type="positional",
            block_out_channels=[int(width) for width in widths],
        )

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Leave out what the constructor derives itself."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k not in _DERIVED}, **kwargs)

    @classmethod
    def of(cls, model: Preconditioned) -> FanalUNet:
        """Build one around a copy of a model's weights.

        Raises:
            FanalError: its samples are not images.
        """
        if len(model.shape) != 3:
            raise FanalError(
                f"a diffusers pipeline makes images (C, H, W); this model's samples have shape {model.shape}"
            )
        channels, high, wide = model.shape
        unet = cls(
            network=config_to_dict(model.config),
            in_channels=channels,
            sample_size=high if high == wide else [high, wide],
            num_class_embeds=model.classes or None,
            preconditioning=model.preconditioning,
            sigma_data=model.sigma_data,
            sigma_min=model.sigma_min,
            sigma_max=model.sigma_max,
        )
        unet.model.load_state_dict(model.state_dict())
        torch.nn.Module.to(unet, dtype=next(model.parameters()).dtype)
        return unet.eval().requires_grad_(False)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Return the noise ε in z.

        Args:
            sample: z, (B, C, H, W).
            timestep: one for all or one per sample; fractions are allowed.
            class_labels: (B,) whole numbers.
            return_dict: whether the result is an object or a tuple.
        """
        time = torch.as_tensor(timestep)
        sigma = self.times.sigma_of(time.reshape(-1) if time.numel() > 1 else time.reshape(()))
        z = sample if sample.dtype == torch.float64 else sample.float()
        x = x_of(z, sigma, "vp")
        denoised = self.model(x, sigma, class_labels)
        noise = output_of(denoised, x, sigma, "epsilon").to(sample.dtype)
        return UNet2DOutput(sample=noise) if return_dict else (noise,)


def export_pipeline(source: str | Denoiser, out: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, Any]:
    """Write a model as a diffusers pipeline: safetensors weights, a DDIM scheduler with its betas, and a README.

    The folder is made beside its place and then moved, so that a failure leaves what was there.

    Args:
        source: a spec as in `fanal.load` (an embedded model, a model folder, a checkpoint), or a model.
        out: the folder to write.
        overwrite: replace an exported pipeline that is there already.

    Returns:
        The model's card.

    Raises:
        FanalError: the model is none of fanal's networks, or makes no images, or the place is taken.
    """
    folder = Path(out)
    check_folder(folder, "a pipeline", _is_exported, overwrite)
    if isinstance(source, str) and source.endswith(".pkl") and ":" not in source:
        source = f"edm:{source}"
    network = network_of(open_network(source) if isinstance(source, str) else source)
    if not isinstance(network, Preconditioned):
        name = source if isinstance(source, str) else type(network).__name__
        raise FanalError(f"{name} is no network of fanal's (fanal models list, fanal train, fanal convert)")
    card = card_of(source) if isinstance(source, str) else {}
    unet = FanalUNet.of(network)
    scheduler = DDIMScheduler(
        unet.config["num_train_timesteps"], trained_betas=unet.betas, clip_sample=False, timestep_spacing="trailing"
    )
    part, old = (folder.with_name(f".{folder.name}.{kind}{os.getpid()}") for kind in ("part", "old"))
    try:
        DDIMPipeline(unet, scheduler).save_pretrained(part)  # pyright: ignore[reportArgumentType]
        text = _readme(source if isinstance(source, str) else "", card, unet)
        write_atomically(part / "README.md", lambda place: place.write_text(text, encoding="utf-8"))
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise FanalError(f"cannot write {folder}: {reason(error)}; try another place") from error
    finally:
        for place in (part, old):
            shutil.rmtree(place, ignore_errors=True)
    return card


def _is_exported(folder: Path) -> bool:
    """Whether a folder is a pipeline that was exported from here."""
    index: dict[str, Any] = {}
    with contextlib.suppress(FanalError):
        index = read_json(folder / "model_index.json")
    return index.get("unet") == _UNET


def _readme(spec: str, card: Mapping[str, Any], unet: FanalUNet) -> str:
    """What is in the folder, how to load it, and what its times mean."""
    config = unet.config
    about = card.get("summary") or f"{type(unet.model.net).__name__}, {unet.num_parameters():,} parameters"
    origin = f" from `{spec}`" if spec else ""
    license_ = f"\n- License: {card['license']}" if isinstance(card.get("license"), str) else ""
    low, high, count = max(config["sigma_min"], _LOWEST), config["sigma_max"], config["num_train_timesteps"]
    return f"""# {about}

Written by fanal{origin}. It loads with diffusers where fanal is installed (`pip install "fanal[diffusers]"`); no code
of this folder is run. diffusers says that it expected a UNet2DModel: that is all.

```python
from diffusers import DDIMPipeline

import fanal.adapters.export  # diffusers loads the network's class from here

pipe = DDIMPipeline.from_pretrained("THIS FOLDER")
images = pipe(batch_size=4, num_inference_steps=40).images
```

- Images: {config["in_channels"]} x {config["sample_size"]} pixels, in [-1, 1] inside the pipeline.
- Classes: {
        config["num_class_embeds"] or "none"
    }. The pipeline samples without a class; `pipe.unet` takes `class_labels`.
- The network answers the noise of z = x/sqrt(1 + sigma^2). Its time t means
  sigma_t = (a + t/{count - 1} (b - a))^7 with a = {low:g}^(1/7), b = {high:g}^(1/7), for t = 0 ... {count - 1}.
  The betas in `scheduler/scheduler_config.json` say the same: alpha_bar_t = 1/(1 + sigma_t^2).
- Evenly spaced times (`trailing`) are nodes of Karras' curve with rho = 7, N of them from sigma_max down, the last one
  step above the curve's end, and then 0. Take a number of steps N that divides {count}.{license_}
"""
