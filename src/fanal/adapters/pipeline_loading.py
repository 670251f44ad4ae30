"""From a checked folder to a live pipeline object: one component at a time, nothing else is loaded."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import torch

from fanal.adapters.pipeline_files import Component, Layout
from fanal.errors import FanalError

__all__ = ["build_pipeline", "telling"]

_SLACK = 2**24  # buffers that are computed and not stored
_RENAMED = {"Transformer2DModel": "DiTTransformer2DModel"}  # how old DiT folders call it
_EXTRA: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
    "StableDiffusion3Pipeline": {"text_encoder_3": None, "tokenizer_3": None},
}


def build_pipeline(layout: Layout, *, dtype: torch.dtype, variant: str | None = None) -> Any:
    """Build the pipeline that a checked folder describes, on the CPU.

    Args:
        layout: what `read_layout` returned.
        dtype: of the networks; a VAE that overflows in float16 (`force_upcast`) stays in float32.
        variant: which weights, as given to `read_layout`.

    Raises:
        FanalError: a component does not fit its class, its weights are damaged, or some are missing.
    """
    try:
        import diffusers
        import transformers  # noqa: F401  # the components of prompts
    except ImportError as error:
        raise FanalError(f"diffusers pipelines need `pip install 'fanal[diffusers]'`: {error}") from error
    parts: dict[str, Any] = dict(_EXTRA.get(layout.kind, {}))
    with _quiet():
        for name, component in layout.components.items():
            with telling(f"{layout.folder / name} as a {component.kind}"):
                parts[name] = _build(layout, component, dtype, variant)
        with telling(f"{layout.folder} as a {layout.kind}"):
            return getattr(diffusers, layout.kind)(**parts, **layout.settings)


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Tell in one line what a library thinks of a folder.

    Raises:
        FanalError: whatever went wrong inside.
    """
    try:
        yield
    except FanalError as error:
        raise FanalError(f"cannot read {what}: {error}") from error
    except Exception as error:  # the libraries raise whatever they like at a damaged file
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise FanalError(f"cannot read {what}: {type(error).__name__}: {reason}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' own progress bars and their advice on keys; errors are raised, not logged."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    levels = of_diffusers.get_verbosity(), of_transformers.get_verbosity()
    bars = of_transformers.is_progress_bar_enabled()
    of_diffusers.set_verbosity(logging.CRITICAL)
    of_transformers.set_verbosity(logging.CRITICAL)
    of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        of_diffusers.set_verbosity(levels[0])
        of_transformers.set_verbosity(levels[1])
        if bars:
            of_transformers.enable_progress_bar()


def _build(layout: Layout, component: Component, dtype: torch.dtype, variant: str | None) -> Any:
    text = component.library == "transformers"
    kind = getattr(importlib.import_module(component.library), _RENAMED.get(component.kind, component.kind))
    place = str(layout.folder / component.name)
    if component.name == "scheduler":
        return kind.from_config(component.config)
    if component.name.startswith("tokenizer"):
        return kind.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    _check_memory(kind, component, place)
    options: dict[str, Any] = {
        "dtype" if text else "torch_dtype": dtype,
        "use_safetensors": component.files[-1].suffix == ".safetensors",
    }
    if component.name == "vae" and dtype == torch.float16 and component.config.get("force_upcast", True):
        options["torch_dtype"] = torch.float32
    if text:
        options |= {"trust_remote_code": False, "attn_implementation": "sdpa"}
    else:
        options["low_cpu_mem_usage"] = importlib.util.find_spec("accelerate") is not None
    net, told = kind.from_pretrained(place, variant=variant, local_files_only=True, output_loading_info=True, **options)
    missing = sorted(told["missing_keys"]) + sorted(str(key) for key in told.get("mismatched_keys", ()))
    if missing:
        raise FanalError(f"the weights lack {len(missing)} tensors of this network, such as {missing[0]!r:.80}")
    return net.eval().requires_grad_(False)


def _check_memory(kind: Any, component: Component, place: str) -> None:
    """Build the network without memory, and refuse it where it has more numbers than its files have bytes."""
    with torch.device("meta"):
        if component.library == "transformers":
            net = kind(kind.config_class.from_pretrained(place, local_files_only=True))
        else:
            net = kind.from_config(component.config)
    count = sum(tensor.numel() for tensor in (*net.parameters(), *net.buffers()))
    if count > component.bytes + _SLACK:
        raise FanalError(f"its config.json describes {count:,} numbers, its weights hold {component.bytes:,} bytes")
