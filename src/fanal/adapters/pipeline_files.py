"""What is in a pipeline's folder, found out before anything is imported or built: a list of known classes and files.

`model_index.json` names a class of diffusers and, for each component, a library and a class. Only the names listed here
pass. Code in the folder, quantized or adapter weights and settings that make a library fetch more are refused, and so
is a network that would need more memory than its files hold.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanal import hub
from fanal.errors import FanalError, reason, unknown_name
from fanal.files import read_json, sha256_of

__all__ = ["Component", "Layout", "PIPELINES", "fetch", "read_layout", "refuse_settings"]

_CLIP = ("CLIPTokenizer", "CLIPTokenizerFast")
_T5 = ("T5Tokenizer", "T5TokenizerFast")
_TEXT = ("CLIPTextModel",)
_POOLED = ("CLIPTextModelWithProjection",)
_VAE = ("AutoencoderKL",)
_CONDITION = ("UNet2DConditionModel",)

PIPELINES: dict[str, dict[str, tuple[str, ...]]] = {
    "DDPMPipeline": {"unet": ("UNet2DModel", "FanalUNet")},
    "DDIMPipeline": {"unet": ("UNet2DModel", "FanalUNet")},
    "ScoreSdeVePipeline": {"unet": ("UNet2DModel",)},
    "DiTPipeline": {"transformer": ("DiTTransformer2DModel", "Transformer2DModel"), "vae": _VAE},
    "StableDiffusionPipeline": {"unet": _CONDITION, "vae": _VAE, "text_encoder": _TEXT, "tokenizer": _CLIP},
    "StableDiffusionXLPipeline": {
        "unet": _CONDITION,
        "vae": _VAE,
        "text_encoder": _TEXT,
        "tokenizer": _CLIP,
        "text_encoder_2": _POOLED,
        "tokenizer_2": _CLIP,
    },
    "StableDiffusion3Pipeline": {
        "transformer": ("SD3Transformer2DModel",),
        "vae": _VAE,
        "text_encoder": _POOLED,
        "tokenizer": _CLIP,
        "text_encoder_2": _POOLED,
        "tokenizer_2": _CLIP,
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer_3": _T5,
    },
    "FluxPipeline": {
        "transformer": ("FluxTransformer2DModel",),
        "vae": _VAE,
        "text_encoder": _TEXT,
        "tokenizer": _CLIP,
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer_2": _T5,
    },
}
"""The pipelines that are read, and for each component beside the scheduler the classes it may have."""

_OWN = {"FanalUNet": "fanal.adapters.export", "FanalScheduler": "fanal.adapters.scheduler"}
_OPTIONAL = {"text_encoder_3", "tokenizer_3"}
_SKIPPED = {"safety_checker", "feature_extractor", "image_encoder", "image_processor", "watermark"}
_SETTINGS = {"StableDiffusionXLPipeline": ("force_zeros_for_empty_prompt",)}
_REFUSED = {
    "auto_map": "a class from the folder's own code",
    "custom_pipelines": "a pipeline from the folder's own code",
    "quantization_config": "quantized weights",
    "attn_implementation": "an attention kernel",
    "_attn_implementation": "an attention kernel",
    "experts_implementation": "a kernel",
    "_experts_implementation": "a kernel",
}
_CODE = {".py", ".pyc", ".so", ".pkl", ".pickle"}
_LONGEST, _DEEPEST, _LARGEST, _LAYERS, _STEPS = 4096, 8, 2**24, 256, 2**17
_BLOCKS, _PER_BLOCK = 16, 64  # their product is what building costs, even without memory
_TEXT_BYTES = 2**26
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model|pytorch_model)(?P<rest>[\w.-]*)\.(?P<kind>safetensors|bin)")
_SHARD = re.compile(r"(\.(?P<first>[a-z][\w]*))?(-\d{5}-of-\d{5})?(\.(?P<last>[a-z][\w]*))?")
_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_TOKENIZER += ("added_tokens.json", "spiece.model")


@dataclass(frozen=True)
class Component:
    """One component of a pipeline's folder.

    Attributes:
        name: e.g. `unet`.
        library: `diffusers`, `transformers`, or fanal's own export.
        kind: name of its class.
        config: its configuration, checked; {} for tokenizers.
        files: the files that loading it reads.
        bytes: size of its weights.
    """

    name: str
    library: str
    kind: str
    config: dict[str, Any]
    files: tuple[Path, ...]
    bytes: int = 0


@dataclass(frozen=True)
class Layout:
    """A pipeline's folder, checked.

    Attributes:
        folder: where it is.
        kind: name of the pipeline's class.
        version: `_diffusers_version` that wrote it; "" where it does not say.
        components: what is loaded, by name.
        settings: arguments of the pipeline beside its components.
    """

    folder: Path
    kind: str
    version: str
    components: Mapping[str, Component]
    settings: Mapping[str, Any]

    @functools.cached_property
    def hashes(self) -> dict[str, dict[str, str]]:
        """The SHA-256 of every file that loading reads, by component and name; files of gigabytes are read once."""
        found = {"": {"model_index.json": sha256_of(self.folder / "model_index.json")}}
        return found | {name: {f.name: sha256_of(f) for f in c.files} for name, c in self.components.items()}


def read_layout(folder: Path, *, allow_bin: bool = False, variant: str | None = None) -> Layout:
    """Read and check `model_index.json` and the folders it names; nothing is imported.

    Args:
        folder: a pipeline's folder, as `save_pretrained` writes it.
        allow_bin: read `.bin` weights where there is no safetensors file.
        variant: which weights, e.g. `fp16`; None: those without a variant.

    Raises:
        FanalError: a file is missing, damaged or too large, or names something that is not on the list.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise FanalError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    _check_variant(variant)
    index = read_json(path)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        raise unknown_name("pipeline class", str(kind)[:60], PIPELINES)
    refuse_settings(index, path.name)
    _no_code(folder)
    version = str(index.get("_diffusers_version", ""))[:40]
    wanted = PIPELINES[kind] | {"scheduler": ()}
    _check_entries(index, wanted, kind)
    components: dict[str, Component] = {}
    for name, classes in wanted.items():
        entry = index.get(name)
        if entry is None or entry == [None, None]:
            if name not in _OPTIONAL:
                raise FanalError(f"{path} has no {name}, which a {kind} needs")
            continue
        components[name] = _component(folder, name, entry, classes, allow_bin, variant)
    settings = {key: index[key] for key in _SETTINGS.get(kind, ()) if isinstance(index.get(key), bool)}
    return Layout(folder, kind, version, components, settings)


def _check_entries(index: dict[str, Any], wanted: Mapping[str, Any], kind: str) -> None:
    for name, value in index.items():
        if isinstance(value, list) and name not in wanted and name not in _SKIPPED:
            raise FanalError(f"model_index.json has a component {name[:60]!r}, which a {kind} has no place for")


def _component(
    folder: Path, name: str, entry: object, classes: tuple[str, ...], allow_bin: bool, variant: str | None
) -> Component:
    from fanal.adapters.pipeline_schedulers import SCHEDULERS

    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
        raise FanalError(f"model_index.json: {name} should be [library, class], got {str(entry)[:80]}")
    library, kind = str(entry[0]), str(entry[1])
    known = classes or (*SCHEDULERS, "FanalScheduler")
    text = name.startswith(("text_encoder", "tokenizer"))
    if library != _OWN.get(kind, "transformers" if text else "diffusers"):
        raise FanalError(f"model_index.json: {name} comes from {library[:60]!r}, which is not loaded")
    if kind not in known:
        raise unknown_name(f"class of {name}", kind[:60], known)
    place = folder / name
    if not place.is_dir():
        raise FanalError(f"{folder} has no folder {name}: fetch the whole pipeline")
    _no_code(place)
    if name.startswith("tokenizer"):
        return Component(name, library, kind, {}, _texts(place))
    file = place / ("scheduler_config.json" if name == "scheduler" else "config.json")
    config = read_json(file)
    refuse_settings(config, f"{name}/{file.name}")
    _bounded(config, f"{name}/{file.name}")
    if name == "scheduler":
        return _scheduler(kind, config, file, tuple(SCHEDULERS))
    weights = _weights(place, allow_bin, variant)
    return Component(name, library, kind, config, (file, *weights), sum(_size(w) for w in weights))


def _scheduler(kind: str, config: dict[str, Any], file: Path, known: tuple[str, ...]) -> Component:
    """A scheduler; of fanal's own, the one that it replaces, whose settings it keeps."""
    if kind == "FanalScheduler":
        kind = str(config.get("replaces"))
        if kind not in known:
            raise unknown_name("replaced scheduler", kind[:60], known)
    return Component("scheduler", "diffusers", kind, config, (file,))


def _no_code(folder: Path) -> None:
    """Refuse a folder that holds code; it would not be run, but it is no plain pipeline either."""
    found = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _CODE)
    if found:
        raise FanalError(f"{folder} holds code ({found[0][:60]!r}): only pipelines of diffusers' own classes are read")
    if (folder / "adapter_config.json").exists():
        raise FanalError(f"{folder} holds an adapter: merge it into the weights first (pipeline.fuse_lora)")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise FanalError(f"cannot read {path}: {reason(error)}") from error


def _texts(folder: Path) -> tuple[Path, ...]:
    files = tuple(folder / name for name in _TOKENIZER if (folder / name).exists())
    for file in files:
        if _size(file) > _TEXT_BYTES:
            raise FanalError(f"{file} has more than {_TEXT_BYTES} bytes, which no tokenizer needs")
        if file.suffix == ".json":
            refuse_settings(read_json(file), file.name)
    if not files:
        raise FanalError(f"{folder} has no tokenizer files: expected some of {', '.join(_TOKENIZER)}")
    return files


def _check_variant(variant: str | None) -> None:
    if variant is not None and not re.fullmatch(r"[a-z][\w]{0,31}", variant):
        raise FanalError(f"variant is a short word such as fp16, got {variant!r}")


def _is_weights(name: str, kind: str, variant: str | None) -> bool:
    """Whether this is a weights file of one kind and variant, whole or a shard."""
    found = _WEIGHTS.fullmatch(name)
    parts = _SHARD.fullmatch(found["rest"]) if found and found["kind"] == kind else None
    return bool(parts) and (parts["first"] or parts["last"]) == variant


def _weights(folder: Path, allow_bin: bool, variant: str | None) -> tuple[Path, ...]:
    """The weights that a component's loader will take: safetensors, else `.bin` where that is allowed."""
    names = sorted(entry.name for entry in folder.iterdir())
    safe = [name for name in names if _is_weights(name, "safetensors", variant)]
    kind, chosen = "safetensors", safe
    if not safe:
        kind, chosen = "bin", [name for name in names if _is_weights(name, "bin", variant)]
        if chosen and not allow_bin:
            raise FanalError(
                f"{folder} has weights only as a pickle ({chosen[0]}): convert it (pipeline.save_pretrained with "
                "safe_serialization=True), or pass allow_bin=True (--allow-bin) to read it with torch's weights-only "
                "loader, which runs no code"
            )
    if not chosen:
        held = f"; it has {', '.join(names[:6])}"[:200] if names else ""
        wanted = f" of variant {variant!r}" if variant else ""
        raise FanalError(f"{folder} has no safetensors weights{wanted}{held}")
    for name in names:
        if name.endswith(f".{kind}.index.json") or (variant and name.endswith(f".index.{variant}.json")):
            _check_shards(folder, name)
    return tuple(folder / name for name in chosen)


def _check_shards(folder: Path, name: str) -> None:
    """The parts that an index names must be plain names of files in the same folder."""
    places = read_json(folder / name).get("weight_map")
    if not isinstance(places, dict):
        raise FanalError(f"{folder / name} has no weight_map")
    for file in set(map(str, places.values())):
        if not _WEIGHTS.fullmatch(file) or not (folder / file).is_file():
            raise FanalError(f"{folder / name} names {file[:80]!r}, which is no weights file of this folder")


def refuse_settings(value: object, where: str, depth: int = 0) -> None:
    """Refuse settings that would make a library run or fetch something; used on every JSON file.

    Raises:
        FanalError: there is such a setting, at any depth.
    """
    if depth > 2 * _DEEPEST:
        raise FanalError(f"{where} is nested too deeply")
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in _REFUSED and inner is not None:
                raise FanalError(f"{where} asks for {_REFUSED[key]} ({key}): such pipelines are not read")
            refuse_settings(inner, where, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            refuse_settings(inner, where, depth + 1)


def _bounded(value: object, where: str, key: str = "", depth: int = 0) -> None:
    """Bound every number and list of a configuration, so that building it stays small."""
    if depth > _DEEPEST:
        raise FanalError(f"{where} is nested too deeply")
    if isinstance(value, dict | list):
        most = _BLOCKS if "block" in key else _LONGEST
        if len(value) > most:
            raise FanalError(f"{where}: {key or 'it'} has {len(value)} entries, at most {most} are read")
        pairs = value.items() if isinstance(value, dict) else ((key, inner) for inner in value)
        for name, inner in pairs:
            _bounded(inner, where, str(name)[:60], depth + 1)
        return
    if isinstance(value, float) and value != value:
        raise FanalError(f"{where}: {key} is not a number")
    if not isinstance(value, int) or isinstance(value, bool):
        return
    layers = _PER_BLOCK if key == "layers_per_block" else _LAYERS
    most = _STEPS if "timesteps" in key else layers if "layers" in key or "blocks" in key else _LARGEST
    if abs(value) > most:
        raise FanalError(f"{where}: {key} is {value}, at most {most} is read")


def fetch(repository: str, *, allow_bin: bool = False, revision: str | None = None, variant: str | None = None) -> Path:
    """Return the local folder of a hub repository, fetching what its `model_index.json` names and is missing.

    Files come through huggingface_hub's cache: with `HF_HUB_OFFLINE=1`, or without a network, what is in the cache is
    used; `HF_ENDPOINT` names another server. Only configurations, tokenizers and weights of known components are
    fetched.

    Args:
        repository: `ORG/NAME`.
        allow_bin: also fetch `.bin` weights.
        revision: branch, tag or commit; None: `main`.
        variant: which weights, e.g. `fp16`.

    Raises:
        FanalError: the repository or the revision is not to be had, or it is no pipeline that is read.
    """
    _check_variant(variant)
    first = hub.fetch(repository, ["model_index.json"], revision)
    index = read_json(first / "model_index.json") if (first / "model_index.json").is_file() else {}
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        raise unknown_name("pipeline class", str(kind)[:60], PIPELINES)
    wanted = _patterns([*PIPELINES[kind], "scheduler"], allow_bin, variant)
    return hub.fetch(repository, wanted, first.name)  # of the same commit


def _patterns(components: list[str], allow_bin: bool, variant: str | None) -> list[str]:
    """Names of the files to fetch, as patterns."""
    tail = f".{variant}" if variant else ""
    kinds = ("safetensors", "bin") if allow_bin else ("safetensors",)
    patterns = ["model_index.json"]
    for name in components:
        if name.startswith("tokenizer"):
            patterns += [f"{name}/{file}" for file in _TOKENIZER]
            continue
        patterns.append(f"{name}/*.json")
        for kind in kinds:
            for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
                patterns += [f"{name}/{stem}{tail}.{kind}", f"{name}/{stem}{tail}-0*-of-0*.{kind}"]
                patterns += [f"{name}/{stem}-0*-of-0*{tail}.{kind}"] if variant else []
    return patterns
