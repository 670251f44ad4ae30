"""`load`: one place that turns a model spec into a Denoiser."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fanal.denoiser import Counted, Denoiser, Labelled, Model, Native, Prompted, Wrapper
from fanal.errors import FanalError, unknown_name
from fanal.files import sha256_of
from fanal.guidance import ClassifierFree
from fanal.processes import check_device

__all__ = [
    "PIPELINES",
    "Conditions",
    "bind",
    "card",
    "embedded",
    "fingerprint",
    "load",
    "open_network",
    "user_function",
]


_CHECKPOINTS = ("edm:", "adm:", "consistency:")  # the kinds of fanal.adapters.CHECKPOINTS
PIPELINES = ("diffusers:", "hub:")
"""How specs of diffusers pipelines begin."""
CLOSED = ("mixture", "gaussian", "data")
"""Kinds of closed forms, those of `fanal.exact.named`."""
_DTYPES = ("float32", "float16", "bfloat16")


def _models_folder() -> Path:
    return Path(str(resources.files("fanal") / "models"))


def embedded() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(path.parent.name for path in _models_folder().glob("*/model.json"))


def _folder_of(spec: str) -> Path | None:
    """The model folder a spec names: an embedded model, or a folder that `fanal train` or `fanal convert` wrote."""
    if spec in embedded():
        return _models_folder() / spec
    path = Path(spec)
    return path if (path / "model.json").is_file() else None


def card(spec: str) -> dict[str, Any]:
    """Return the card of a model: its data, recipe, figures and calibration; empty for closed forms and functions.

    Raises:
        FanalError: the spec names a folder whose card cannot be read, or a file that is no checkpoint.
    """
    from fanal.nets import read_card

    folder = _folder_of(spec)
    if folder is not None:
        return read_card(folder)
    if spec.startswith(_CHECKPOINTS):
        from fanal.adapters import describe_checkpoint

        return describe_checkpoint(spec)
    if spec.startswith(PIPELINES):
        return cast(Native, open_network(spec)).card()
    return _closed_card(spec) if spec.startswith(tuple(f"{kind}:" for kind in CLOSED)) else {}


def _closed_card(spec: str) -> dict[str, Any]:
    """The data set that a closed form is of, where its samples are that set's, with what the set asks for."""
    from fanal.exact.named import named_set
    from fanal.hallucination.calibration import HINTS

    kind, _, text = spec.partition(":")
    if kind != "data" and spec != "mixture:grid2":
        return {}  # a fit's samples are not the data's
    name = named_set(kind, text)
    return {"data": name, **HINTS.get(name, {})}


def fingerprint(spec: str) -> str:
    """Return a hash of what a spec stands for now, so that a resumed run notices when it was replaced.

    The model folder's description, which holds the hash of its weights, the checkpoint itself, a pipeline's files, or
    the source file of a `python:` module; closed forms are the package's own and have none.
    """
    if spec.startswith(_CHECKPOINTS):
        from fanal.adapters import checkpoint_file

        return sha256_of(checkpoint_file(spec))
    if spec.startswith(PIPELINES):
        return cast(Native, open_network(spec)).fingerprint()
    if spec.startswith(tuple(f"{kind}:" for kind in CLOSED)):
        from fanal.exact.named import content

        return content(*spec.split(":", 1))
    folder = _folder_of(spec)
    source: Path | None = folder / "model.json" if folder is not None else None
    if spec.startswith("python:"):
        module = sys.modules.get(spec.removeprefix("python:").rpartition(":")[0])
        file = getattr(module, "__file__", None)
        source = Path(file) if file else None
    return hashlib.sha256(source.read_bytes()).hexdigest() if source is not None else ""


class _Foreign(Wrapper):
    """Tells in one line what went wrong in a denoiser that is not fanal's."""

    def __init__(self, denoiser: Denoiser, name: str) -> None:
        super().__init__(denoiser)
        self.name = name

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        try:
            return self.denoiser(x, sigma)
        except FanalError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            hint = ""
            if isinstance(error, RuntimeError) and ("dtype" in reason or "type" in reason):
                hint = "; sigma is a 0-d float64 tensor: a network wants sigma.to(x).expand(len(x))"
            raise FanalError(
                f"{self.name} failed at sigma {float(sigma.max()):.4g}: {type(error).__name__}: {reason}{hint}"
            ) from error


def user_function(target: str, prefix: str = "", what: str = "function") -> Callable[..., Any]:
    """Import MODULE:FUNC from the user's path, the working folder included.

    Args:
        target: module and function.
        prefix: what stands before it on the command line, for errors.
        what: what it should be, for errors.

    Raises:
        FanalError: it cannot be imported, or is no function.
    """
    module, _, function = target.rpartition(":")
    if not module:
        raise FanalError(f"expected {prefix}MODULE:FUNC, got {prefix}{target}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as python -m does: a module beside the user is found
    try:
        found = getattr(importlib.import_module(module), function)
    except AttributeError:
        known = [name for name in vars(sys.modules.get(module, sys)) if not name.startswith("_")]
        raise unknown_name(f"function of {module}", function, known) from None
    except Exception as error:  # the module is the user's: whatever stops its import is told in one line
        raise FanalError(f"cannot import {module}: {error}; is its folder on PYTHONPATH?") from error
    if not callable(found):
        raise FanalError(f"{target} is no {what}: got {type(found).__name__}")
    return found


def _function(target: str) -> Model:
    """Call FUNC() of a module the user can import; it returns a denoiser with shape, sigma_min and sigma_max."""
    maker = user_function(target, "python:", "function that makes a denoiser")
    try:
        model = maker()
    except Exception as error:
        raise FanalError(f"{target}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, Model):
        raise FanalError(
            f"{target}() must return a callable D(x, sigma) with the attributes shape, sigma_min and sigma_max, "
            f"got {type(model).__name__}"
        )
    return _Foreign(model, target)


def _network(spec: str, device: torch.device | str) -> Model:
    """The bare denoiser of a spec."""
    kind, colon, name = spec.partition(":")
    if colon and kind in CLOSED:
        from fanal.exact.named import closed_form

        return closed_form(kind, name)
    if colon and kind == "python":
        return _function(name)
    if spec.startswith(_CHECKPOINTS):
        from fanal.adapters import load_checkpoint

        return load_checkpoint(spec).to(device)
    folder = _folder_of(spec)
    if folder is None:
        if Path(spec).is_dir():
            if (Path(spec) / "model_index.json").is_file():
                raise FanalError(f"{spec} is a diffusers pipeline: name it diffusers:{spec}")
            raise FanalError(f"{spec} is not a model folder: it has no model.json; fanal train writes one when it ends")
        if spec.startswith(".") or "/" in spec:
            raise FanalError(f"there is no folder {spec}; fanal models list shows the embedded models")
        from fanal.exact.named import GAUSSIANS, MIXTURES

        kinds = [*embedded(), *(f"mixture:{m}" for m in MIXTURES), *(f"gaussian:{g}" for g in GAUSSIANS)]
        more = [
            "data:NAME_OR_DIR",
            "diffusers:DIR",
            "hub:ORG/NAME",
            "edm:FILE.pkl",
            "adm:FILE.pt",
            "consistency:FILE.pt",
            "python:MODULE:FUNC",
            "a folder that fanal train wrote",
        ]
        raise unknown_name("model", spec, [*kinds, *more])
    from fanal.nets import load_model

    return load_model(folder).to(device)


@dataclass(frozen=True)
class Conditions:
    """What a conditional model is asked for.

    Attributes:
        labels: class labels: one for all samples, or one per sample; None: unconditional.
        prompt: a text for all samples, or one per sample, for a text-to-image model; None: no text.
        negative: what guidance leads away from; only with a prompt.
        guidance: scale of classifier-free guidance; None: plain conditional.
    """

    labels: int | Sequence[int] | Tensor | None = None
    prompt: str | Sequence[str] | None = None
    negative: str = ""
    guidance: float | None = None


def _check_labels(labels: int | Sequence[int] | Tensor, classes: int, name: str) -> Tensor:
    values = torch.as_tensor(labels)
    if classes == 0:
        raise FanalError(f"{name} takes no class labels")
    if values.is_floating_point() or values.ndim > 1 or bool(((values < 0) | (values >= classes)).any()):
        raise FanalError(f"labels for {name} are whole numbers in [0, {classes - 1}], got {labels!s:.80}")
    return values


def _told(network: Model, wanted: Conditions, name: str) -> tuple[Model, Tensor | None]:
    """The network that knows the prompts, and the labels to bind: which class, or which prompt."""
    text = isinstance(network, Prompted)
    if not text and (wanted.prompt is not None or wanted.negative):
        raise FanalError(f"{name} takes no prompt: it is no text-to-image model")
    if not text:
        labels = wanted.labels
        return network, None if labels is None else _check_labels(labels, getattr(network, "classes", 0), name)
    if wanted.labels is not None:
        raise FanalError(f"{name} takes a prompt, no class labels")
    if wanted.prompt is None:
        if wanted.negative:
            raise FanalError("a negative prompt needs a prompt: give prompt= (--prompt) as well")
        return network, None
    texts = [wanted.prompt] if isinstance(wanted.prompt, str) else list(wanted.prompt)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise FanalError("prompt is a text, or a list with one text per sample")
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # each text is encoded once
    index = torch.tensor([place[text] for text in texts])
    return network.with_prompts(list(place), wanted.negative), index[0] if isinstance(wanted.prompt, str) else index


def bind(network: Model, wanted: Conditions, name: str = "the model") -> Model:
    """Bind conditions to a network; the result counts its network calls.

    Args:
        network: what `open_network` returned.
        wanted: the conditions.
        name: how errors call the model.

    Raises:
        FanalError: a condition does not fit the model.
    """
    told, labels = _told(network, wanted, name)
    counted = Counted(told)
    if labels is None:
        if wanted.guidance is not None:
            raise FanalError("guidance needs labels or a prompt to guide towards: give --label or --prompt as well")
        return counted
    bound = Labelled(counted, labels)
    if wanted.guidance is None:
        if wanted.negative:
            raise FanalError("a negative prompt needs guidance, which leads away from it: give --guidance as well")
        return bound
    if wanted.guidance != 1 and not getattr(told, "null_label", True):
        raise FanalError(f"{name} was trained with a label for each sample and knows no other: no guidance for it")
    return ClassifierFree(bound, Labelled(counted, told.classes), wanted.guidance)  # pyright: ignore[reportAttributeAccessIssue]


def _pipeline(spec: str | object, allow_bin: bool, device: torch.device) -> Model:
    """A diffusers pipeline from an object, or from a spec with its settings."""
    from fanal.adapters.pipelines import load_pipeline

    if not isinstance(spec, str):
        return load_pipeline(spec, allow_bin=allow_bin, device=device)
    from fanal.config import parse_options, split_settings

    place, text = split_settings(spec)
    kind = spec.partition(":")[0]
    known = ("dtype", "size", "variant", "revision") if kind == "hub" else ("dtype", "size", "variant")
    _, given = parse_options("pipeline", f"{kind}:{text}", (kind,), lambda name: known)
    dtype = given.get("dtype", "float32")
    if dtype not in _DTYPES:
        raise unknown_name("dtype", dtype, _DTYPES)
    size = None
    if "size" in given:
        sides = given["size"].split("x")
        if len(sides) != 2 or not all(side.isascii() and side.isdigit() and len(side) < 6 for side in sides):
            raise FanalError(f"size is HEIGHTxWIDTH in pixels, as in size=512x768, got {given['size']!r:.40}")
        size = (int(sides[0]), int(sides[1]))
    return load_pipeline(
        place.removeprefix("diffusers:"),
        allow_bin=allow_bin,
        device=device,
        dtype=getattr(torch, dtype),
        revision=given.get("revision"),
        variant=given.get("variant"),
        size=size,
    )


def open_network(spec: str | object, *, device: torch.device | str = "cpu", allow_bin: bool = False) -> Model:
    """Open the network of a spec, or of a diffusers pipeline object, without conditions; see `load`.

    Raises:
        FanalError: nothing of that name exists, the file is damaged, or the device is not there.
    """
    where = check_device(device)
    if not isinstance(spec, str) or spec.startswith(PIPELINES):
        return _pipeline(spec, allow_bin, where)
    if allow_bin:
        raise FanalError(f"{spec} is no diffusers pipeline: allow_bin (--allow-bin) has no meaning for it")
    return _network(str(spec), where)


def load(
    spec: str | object,
    *,
    labels: int | Sequence[int] | Tensor | None = None,
    prompt: str | Sequence[str] | None = None,
    negative: str = "",
    guidance: float | None = None,
    device: torch.device | str = "cpu",
    allow_bin: bool = False,
) -> Model:
    """Load a model and bind its conditions; the result counts its network calls (`.calls`, `.evaluations`).

    Args:
        spec: an embedded model (`hands32`); a folder that `fanal train` or `fanal convert` wrote; a closed form
            (`mixture:grid2`, `gaussian:digits8`, and the exact denoiser of a data set or of a folder of images,
            `data:digits8`, `data:DIR,count=1000`); a diffusers pipeline (`diffusers:DIR`, `hub:ORG/NAME`, with settings
            as in `diffusers:DIR,dtype=float16,variant=fp16,size=512x768`, or the pipeline object); an official
            checkpoint (`edm:FILE.pkl`, `adm:FILE.pt`, `consistency:FILE.pt`, read without running what is in it); or
            `python:MODULE:FUNC`, whose FUNC() returns a denoiser with `shape`, `sigma_min` and `sigma_max`.
        labels: class labels for a conditional model: one for all samples, or one per sample; None: unconditional.
        prompt: for a text-to-image model: a text for all samples, or a list with one per sample.
        negative: what guidance leads away from, for a text-to-image model.
        guidance: scale of classifier-free guidance towards the labels or the prompt (1: plain conditional).
        device: where the network runs.
        allow_bin: read a pipeline's `.bin` weights, by torch's weights-only loader, where it has no safetensors.

    Raises:
        FanalError: nothing of that name exists, the file is damaged, or a condition does not fit the model.
    """
    name = spec if isinstance(spec, str) else type(spec).__name__
    return bind(
        open_network(spec, device=device, allow_bin=allow_bin), Conditions(labels, prompt, negative, guidance), name
    )
