"""CLIP score: how well images fit their captions, by a CLIP network from a local folder or the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fanal.adapters.pipeline_files import refuse_settings
from fanal.errors import FanalError, is_number
from fanal.files import read_json
from fanal.hub import fetch
from fanal.metrics.estimates import Estimate, mean
from fanal.metrics.features import as_bytes

__all__ = ["Clip", "Preparation", "clip_score"]

_INSTALL = "CLIP needs transformers: pip install 'fanal[diffusers]'"
_WORDS = ("vocab.json", "tokenizer.json")  # lists of words, no settings
_FILES = ["*.json", "*.txt", "*.safetensors"]
_MOST_PIXELS = 4096


def clip_score(cosines: Float[Tensor, " n"]) -> Estimate:
    """Return the CLIP score, the mean of `100·max(cos, 0)`, with the standard error of a mean.

    Args:
        cosines: of each image's and its caption's embeddings.

    Reference: Hessel et al. 2021, arXiv:2104.08718, eq. 1, with the factor 100 of text-to-image papers for its 2.5.
    """
    return mean(100 * cosines.clamp_min(0))


def _sides(value: object, what: str) -> tuple[int, int]:
    """Height and width from `{"height": …, "width": …}` or one number."""
    pair = (value.get("height"), value.get("width")) if isinstance(value, dict) else (value, value)
    if not all(type(side) is int and 1 <= side <= _MOST_PIXELS for side in pair):
        raise FanalError(f"{what} must be sizes in [1, {_MOST_PIXELS}], got {value!r:.80}")
    return pair  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Preparation:
    """What happens to an image before CLIP sees it, as a model's `preprocessor_config.json` says.

    Attributes:
        shortest: length of the shorter edge after resizing; None where `exact` says it, or nothing is resized.
        exact: height and width after resizing.
        resample: Pillow's number of the filter.
        crop: height and width that are cut from the middle; None for all.
        scale: factor on the bytes.
        mean: subtracted per channel, after scaling.
        std: divided by per channel.
    """

    shortest: int | None
    exact: tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, folder: Path) -> Preparation:
        """Read `preprocessor_config.json`, or the part of `processor_config.json` that says the same.

        Raises:
            FanalError: neither file is there, or a value makes no sense.
        """
        path, own = folder / "preprocessor_config.json", True
        if not path.is_file():
            path, own = folder / "processor_config.json", False
        content: Any = read_json(path)
        content = content if own else content.get("image_processor")
        if not isinstance(content, dict):
            raise FanalError(f"{path} does not say how images are prepared")
        try:
            return cls._of(content)
        except FanalError as error:
            raise FanalError(f"{path}: {error}") from error

    @classmethod
    def _of(cls, content: dict[str, Any]) -> Preparation:
        size = content.get("size", 224) if content.get("do_resize", True) else None
        shortest, exact = None, None
        if isinstance(size, dict) and "shortest_edge" in size:
            shortest = _sides(size["shortest_edge"], "size")[0]
        elif isinstance(size, dict):
            exact = _sides(size, "size")
        elif size is not None:
            shortest = _sides(size, "size")[0]
        crop = _sides(content.get("crop_size", 224), "crop_size") if content.get("do_center_crop", True) else None
        resample = content.get("resample", 3)
        if type(resample) is not int or resample not in range(6):
            raise FanalError(f"resample must be Pillow's number of a filter, got {resample!r:.80}")
        scale = content.get("rescale_factor", 1 / 255) if content.get("do_rescale", True) else 1.0
        means, stds = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if content.get("do_normalize", True):
            means, stds = content.get("image_mean"), content.get("image_std")
        numbers = [scale, *(means if isinstance(means, list | tuple) else [None])]
        numbers += stds if isinstance(stds, list | tuple) else [None]
        if len(numbers) != 7 or not all(is_number(n) for n in numbers) or not all(n > 0 for n in numbers[4:]):
            raise FanalError("rescale_factor, image_mean and image_std must be 1, 3 and 3 numbers")
        return cls(shortest, exact, resample, crop, float(scale), tuple(numbers[1:4]), tuple(numbers[4:]))

    def __call__(self, images: Tensor) -> Float[Tensor, "n 3 h w"]:
        """Resize (on bytes, with Pillow), crop, scale and normalize.

        Args:
            images: (N, 1 or 3, H, W), bytes or floats in [-1, 1].

        Raises:
            FanalError: they are no images.
        """
        picture = as_bytes(images).cpu()
        picture = picture.expand(-1, 3, -1, -1) if picture.shape[1] == 1 else picture
        parts = [self._resize(one) for one in picture.permute(0, 2, 3, 1).contiguous().numpy()]
        x = torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2)
        x = (x if self.crop is None else _center(x, self.crop)).float() * self.scale
        return (x - x.new_tensor(self.mean)[:, None, None]) / x.new_tensor(self.std)[:, None, None]

    def _resize(self, pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        if self.shortest is not None:
            longer = int(self.shortest * max(height, width) / min(height, width))
            height, width = (longer, self.shortest) if height > width else (self.shortest, longer)
        elif self.exact is not None:
            height, width = self.exact
        if (height, width) == pixels.shape[:2]:
            return pixels
        resized = Image.fromarray(pixels).resize((width, height), Image.Resampling(self.resample))
        return np.asarray(resized)


def _center(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the middle out; where there is too little, black is added around it."""
    missing = [max(want - have, 0) for want, have in zip(size, x.shape[2:], strict=True)]
    top, left = ((miss + 1) // 2 for miss in missing)
    x = torch.nn.functional.pad(x, (left, missing[1] - left, top, missing[0] - top))
    top, left = ((have - want) // 2 for want, have in zip(size, x.shape[2:], strict=True))
    return x[:, :, top : top + size[0], left : left + size[1]]


def _folder_of(spec: str) -> Path:
    """The local folder of a CLIP: the given one, or the hub's, of which nothing but text and safetensors is fetched."""
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return folder
    if spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise FanalError(f"there is no folder {spec}; give one with a CLIP, or the hub's id, ORG/NAME")
    return fetch(spec, _FILES)


def _load(folder: Path, size: int) -> Any:
    """Load the network; every weight must be in the files, and no more than they can hold is allocated."""
    from transformers import CLIPConfig, CLIPModel

    for file in sorted(folder.glob("*.json")):
        if file.name not in _WORDS:
            refuse_settings(read_json(file), str(file))
    if (folder / "adapter_config.json").exists():
        raise FanalError(f"{folder} holds an adapter, which is not read: merge it into the weights first")
    config = CLIPConfig.from_pretrained(str(folder), local_files_only=True)
    with torch.device("meta"):
        count = sum(weight.numel() for weight in CLIPModel(config).parameters())
    if count > size:
        raise FanalError(
            f"{folder / 'config.json'} describes {count} parameters, but the weights' files have {size} bytes"
        )
    loaded: Any = CLIPModel.from_pretrained(
        str(folder),
        config=config,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        trust_remote_code=False,
        attn_implementation="sdpa",
    )
    model, told = loaded
    if told["missing_keys"]:
        missing = sorted(told["missing_keys"])
        raise FanalError(f"the weights in {folder} leave out {len(missing)} that a CLIP needs, {missing[0]} among them")
    return model


class Clip:
    """A CLIP network with its tokenizer and its preparation of images; nothing is unpickled.

    Args:
        spec: a local folder, or ORG/NAME on the Hugging Face hub.
        device: where the network runs.

    Attributes:
        name: the spec.
        sha256: hash of the weights' files.

    Raises:
        FanalError: transformers is missing, there is no such CLIP, its weights are not safetensors, or it is damaged.
    """

    def __init__(self, spec: str, device: torch.device | str = "cpu") -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise FanalError(_INSTALL) from error
        folder = _folder_of(spec)
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise FanalError(f"{spec} has no weights as safetensors, and others are not read: they may run code")
        self.name, self.device, self.prepare = spec, device, Preparation.read(folder)
        whole = hashlib.sha256()
        for file in weights:
            with open(file, "rb") as content:
                whole.update(hashlib.file_digest(content, "sha256").digest())
        self.sha256 = whole.hexdigest()
        try:
            model = _load(folder, sum(file.stat().st_size for file in weights))
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except FanalError:
            raise
        except Exception as error:  # transformers raises whatever it meets
            reason = (str(error).strip().splitlines() or [""])[0]
            raise FanalError(f"cannot load a CLIP from {spec}: {type(error).__name__}: {reason}") from error
        self.model: Any = model.eval().requires_grad_(False).to(device)  # pyright: ignore[reportArgumentType]
        self.longest = int(self.model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: Sequence[str]) -> Float[Tensor, " n"]:
        """Return the cosine of each image's embedding with its caption's; long captions are cut.

        Args:
            images: (N, 1 or 3, H, W), bytes or floats in [-1, 1].
            texts: one caption per image.

        Raises:
            FanalError: not one caption per image, or the network fails.
        """
        if len(images) != len(texts):
            raise FanalError(f"each image needs one caption, got {len(images)} images and {len(texts)} captions")
        words = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        ).to(self.device)
        try:
            out = self.model(
                input_ids=words["input_ids"],
                attention_mask=words["attention_mask"],
                pixel_values=self.prepare(images).to(self.device),
            )
        except (RuntimeError, ValueError, IndexError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise FanalError(f"the CLIP {self.name} does not fit its own configuration: {reason}") from error
        pair = (out.image_embeds.float(), out.text_embeds.float())
        return torch.nn.functional.cosine_similarity(*pair).cpu()
