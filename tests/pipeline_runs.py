"""Runs of the tiny pipelines with any scheduler, and the same pipelines as denoisers under the same conditions."""

import functools

import torch

import fanal
import pipelines
from fanal.adapters.pipelines import PipelineNetwork, PromptedPipeline
from fanal.denoiser import Labelled
from fanal.guidance import ClassifierFree

CALLS = {
    "ddpm": {"batch_size": 2, "output_type": "pt"},
    "ddim": {"batch_size": 2, "output_type": "pt"},
    "dit": {"class_labels": [3, 5], "output_type": "pt", "guidance_scale": 2.0},
    **{name: {"prompt": ["a cat", "two"], "output_type": "latent"} for name in ("sd", "sd_v", "sdxl", "sd3")},
    "flux": {"prompt": ["a cat", "two"], "output_type": "latent", "height": 16, "width": 16},
}
PLAIN = ["ddim", "dit", "sd", "sd_v", "sdxl", "sd3", "flux"]  # deterministic as they come


@functools.cache
def tiny(name):
    pipe = pipelines.MAKERS[name]()
    return pipe, pipe.scheduler


def run(name, scheduler, steps=8, seed=3, **more):
    """Run a pipeline with another scheduler; the result and the number of calls of its network."""
    pipe, own = tiny(name)
    net, calls = getattr(pipe, "unet", None) or pipe.transformer, []
    hook = net.register_forward_pre_hook(lambda *_: calls.append(1))
    pipe.scheduler = scheduler
    generator = torch.Generator().manual_seed(seed)
    try:
        options = {"num_inference_steps": steps} | CALLS[name] | more
        return pipe(generator=generator, **options)[0], len(calls)
    finally:
        hook.remove()
        pipe.scheduler = own


def own(name):
    return tiny(name)[1]


def near(got, want, tolerance=3e-6):
    return float((got - want).abs().max()) <= tolerance * float(want.abs().max())


def bound(name):
    """A pipeline's denoiser under the conditions of CALLS."""
    pipe, scheduler = tiny(name)
    pipe.scheduler = scheduler
    if name in ("ddpm", "ddim"):
        return PipelineNetwork(pipe)
    if name == "dit":
        D = PipelineNetwork(pipe)
        return ClassifierFree(Labelled(D, [3, 5]), Labelled(D, D.classes), 2.0)
    D = PromptedPipeline(pipe, (16, 16)).with_prompts(["a cat", "two"])
    scale = {"sd": 7.5, "sd_v": 7.5, "sdxl": 5.0, "sd3": 7.0}.get(name)
    told = Labelled(D, [0, 1])
    return told if scale is None else ClassifierFree(told, Labelled(D, D.classes), scale)


def network(D):
    return fanal.denoiser.network_of(D)


def _flux():
    from diffusers import FluxPipeline

    return FluxPipeline


def pack(x):
    return _flux()._pack_latents(x, *x.shape)


def packed(D):
    """A denoiser of Flux's packed latents."""

    def denoiser(x, sigma):
        return pack(D(_flux()._unpack_latents(x, 8, 8, 1), sigma))

    return denoiser


def pipelines_noise(name, seed=3):
    """The noise that a pipeline draws from this seed, unpacked."""
    channels = 3 if name.startswith("dd") else 4
    side = pipelines.SIDE
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, channels, side, side), generator=generator)
