"""How a model is trained, as data; and the recipes of the models that come with fanal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fanal.averaging import Profile, profiles
from fanal.errors import FanalError, is_number, unknown_name
from fanal.nets.folder import config_from_dict, config_to_dict
from fanal.nets.mlp import MLPConfig
from fanal.nets.preconditioning import NetConfig
from fanal.nets.unet import UNetConfig
from fanal.objectives import NOISE_LEVELS, OBJECTIVES, LogNormal, NoiseLevels

__all__ = ["RECIPES", "Recipe", "change"]

_WEIGHTINGS = ("edm", "none")
_PRECISIONS = ("float32", "bf16", "fp16")
_AUGMENT_DIM = 9
_LATER = ("accumulate", "augment", "flip", "precision")  # left out of a description at their defaults, as in old cards


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which weights come out of a training run.

    Args:
        data: data set, as in `fanal.datasets.get`.
        net: architecture and size.
        iterations: number of optimizer steps.
        batch: samples per step over all processes, drawn with replacement.
        learning_rate: of Adam, after warm-up.
        warmup: steps over which the learning rate rises linearly from 0.
        constant: share of the steps up to which the learning rate stays; then it falls to 0 as a cosine.
        betas: of Adam.
        clip: largest norm of the gradient; larger ones are scaled down to it.
        ema: the averages of the weights that are kept, as in `fanal.averaging.profiles`: a decay, "power:SIGMA_REL",
            or several of them; the first becomes the model.
        objective: name in `fanal.objectives.OBJECTIVES`.
        weighting: `"edm"` weighs an objective's noise levels so that its gradients have the scale of "edm";
            `"none"` leaves it as its formula says.
        noise_levels: distribution of sigma.
        sigma_data: standard deviation of the data; None measures it on the training set.
        sigma_min: smallest noise level the model is for.
        sigma_max: largest noise level the model is for.
        conditional: whether the model gets the data set's labels.
        label_dropout: share of labels replaced by the null class, so that one model also answers without a label.
        train_count: samples of the training split; None takes the data set's own number.
        held_out_count: samples of the held-out split, for validation; 0 for none.
        seed: decides initial weights, batches, noise and dropout.
        threads: threads of the CPU; part of the recipe, because sums depend on it in the last bit.
        accumulate: pieces that a process cuts its share of a batch into, so that a large batch fits into memory; the
            gradient is that of the whole batch, up to rounding.
        precision: of the network's layers while training: "float32", "bf16" or "fp16" (with a scaled loss); the
            weights and their averages are float32.
        augment: probability of each transformation of `fanal.augmentation`; the network is told which were applied
            and needs `augment_dim = 9`. 0 for no augmentation.
        flip: whether half of the images are mirrored, and the network is not told: for images that look as likely
            mirrored.

    Raises:
        FanalError: a value is out of range, or two of them clash.
    """

    data: str
    net: NetConfig
    iterations: int
    batch: int = 32
    learning_rate: float = 1.5e-3
    warmup: int = 0
    constant: float = 0.6
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float | str | tuple[float | str, ...] = 0.999
    objective: str = "edm"
    weighting: str = "edm"
    noise_levels: NoiseLevels = field(default_factory=LogNormal)
    sigma_data: float | None = None
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    conditional: bool = False
    label_dropout: float = 0.0
    train_count: int | None = None
    held_out_count: int = 256
    seed: int = 0
    threads: int = 1
    accumulate: int = 1
    precision: str = "float32"
    augment: float = 0.0
    flip: bool = False

    def __post_init__(self) -> None:
        _check_kinds(self)
        _check_counts(self)
        _check_numbers(self)
        if self.objective not in OBJECTIVES:
            raise unknown_name("objective", str(self.objective), OBJECTIVES)
        if self.weighting not in _WEIGHTINGS:
            raise unknown_name("weighting", str(self.weighting), _WEIGHTINGS)
        if self.precision not in _PRECISIONS:
            raise unknown_name("precision", str(self.precision), _PRECISIONS)
        _check_augmentation(self)
        if self.objective == "edm" and self.weighting == "none":
            raise FanalError('the objective "edm" is "dae" with its own weighting: for "none" use objective "dae"')
        if self.label_dropout and not self.conditional:
            raise FanalError(f"label_dropout is {self.label_dropout}, but conditional is False: there are no labels")
        if self.warmup > self.constant * self.iterations:
            raise FanalError(
                f"warmup takes {self.warmup} of {self.iterations} iterations, but the learning rate falls from "
                f"iteration {self.constant * self.iterations:g} on: shorten the warm-up or raise constant"
            )

    @property
    def averages(self) -> tuple[Profile, ...]:
        """The averages of the weights that are kept; the first becomes the model."""
        return profiles(self.ema)

    def rate(self, iteration: int) -> float:
        """Return the learning rate of step `iteration` (from 0): warm-up, constant, then a cosine to 0."""
        start = self.constant * self.iterations
        rise = min(1.0, (iteration + 1) / self.warmup) if self.warmup else 1.0
        share = max(0.0, (iteration - start) / (self.iterations - start)) if iteration > start else 0.0
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * share))

    def to_dict(self) -> dict[str, Any]:
        """Describe the recipe as plain JSON values; some fields are left out where they have their default."""
        name = next(name for name, kind in NOISE_LEVELS.items() if isinstance(self.noise_levels, kind))
        fields = dataclasses.fields(self)
        values = {
            f.name: getattr(self, f.name) for f in fields if f.name not in _LATER or getattr(self, f.name) != f.default
        }
        net = config_to_dict(self.net)
        if isinstance(self.net, UNetConfig) and not self.net.augment_dim:
            del net["augment_dim"]
        return values | {
            "net": net,
            "ema": list(self.ema) if isinstance(self.ema, tuple) else self.ema,
            "noise_levels": {"name": name} | dataclasses.asdict(self.noise_levels),
            "betas": list(self.betas),
        }

    @classmethod
    def from_dict(cls, description: dict[str, Any]) -> Recipe:
        """Build a recipe from what `to_dict` wrote or a TOML file says.

        Raises:
            FanalError: an unknown or missing key, or a value that no recipe has.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in description:
            if key not in known:
                raise unknown_name("recipe field", str(key), known)
        missing = {"data", "net", "iterations"} - description.keys()
        if missing:
            raise FanalError(f"a recipe needs {', '.join(sorted(missing))}")
        values = dict(description)
        for key in ("net", "noise_levels"):
            if key in values and not isinstance(values[key], dict):
                raise FanalError(f"{key} must be a table, got {values[key]!r:.80}")
        values["net"] = config_from_dict(values["net"])
        if "noise_levels" in values:
            values["noise_levels"] = _noise_levels(values["noise_levels"])
        if "betas" in values:
            values["betas"] = tuple(values["betas"]) if isinstance(values["betas"], (list, tuple)) else ()
        if isinstance(values.get("ema"), list):
            values["ema"] = tuple(values["ema"])
        return cls(**values)


def change(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with some values changed; a network that is to see augmented images gets `augment_dim = 9`.

    Args:
        recipe: what to start from.
        changes: new values, as a TOML file has them, by field; fields of tables as in "net.dropout".

    Raises:
        FanalError: there is no such field, or no recipe has such values.
    """
    description = recipe.to_dict()
    for key, value in changes.items():
        table, dot, field = key.rpartition(".")
        if dot and table not in ("net", "noise_levels"):
            raise unknown_name("table of a recipe", table, ["net", "noise_levels"])
        (description[table] if dot else description)[field] = value
    augmented = is_number(description.get("augment")) and description["augment"] > 0
    if augmented and isinstance(description["net"], dict) and hasattr(recipe.net, "augment_dim"):
        description["net"].setdefault("augment_dim", 0)
        description["net"]["augment_dim"] = description["net"]["augment_dim"] or _AUGMENT_DIM
    return Recipe.from_dict(description)


def _noise_levels(description: dict[str, Any]) -> NoiseLevels:
    fields = dict(description)
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in NOISE_LEVELS:
        raise unknown_name("distribution of noise levels", str(name), NOISE_LEVELS)
    kind = NOISE_LEVELS[name]
    known = [f.name for f in dataclasses.fields(kind)]
    for key, value in fields.items():
        if key not in known:
            raise unknown_name(f"field of {kind.__name__}", str(key), known)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FanalError(f"{kind.__name__}.{key} must be a number, got {value!r:.80}")
    return kind(**fields)


def _check_counts(recipe: Recipe) -> None:
    for name, low in (
        ("iterations", 1),
        ("batch", 1),
        ("warmup", 0),
        ("held_out_count", 0),
        ("seed", 0),
        ("threads", 1),
        ("accumulate", 1),
    ):
        value = getattr(recipe, name)
        limit = 2**32 if name == "iterations" else 2**63
        if type(value) is not int or not low <= value < limit:
            raise FanalError(f"{name} must be a whole number of at least {low}, got {value!r}")
    if recipe.train_count is not None and (type(recipe.train_count) is not int or recipe.train_count < 1):
        raise FanalError(f"train_count must be a positive whole number or None, got {recipe.train_count!r}")


def _check_augmentation(recipe: Recipe) -> None:
    if recipe.accumulate > recipe.batch:
        raise FanalError(f"a batch of {recipe.batch} cannot be accumulated in {recipe.accumulate} pieces")
    if not recipe.augment:
        return
    length = getattr(recipe.net, "augment_dim", None)
    if length is None:
        raise FanalError("augment moves images, and an MLP cannot be told how: use a U-Net, or augment = 0")
    if length != _AUGMENT_DIM:
        raise FanalError(f"with augment > 0 the network needs augment_dim = {_AUGMENT_DIM}, got {length}")


def _check_kinds(recipe: Recipe) -> None:
    kinds = (("data", str), ("objective", str), ("weighting", str), ("conditional", bool), ("flip", bool))
    for name, kind in kinds:
        if not isinstance(getattr(recipe, name), kind):
            raise FanalError(f"{name} must be a {kind.__name__}, got {getattr(recipe, name)!r:.80}")


def _check_numbers(recipe: Recipe) -> None:
    limits = (
        ("learning_rate", 0, math.inf, False),
        ("clip", 0, math.inf, False),
        ("constant", 0, 1, True),
        ("label_dropout", 0, 1, True),
        ("augment", 0, 1, True),
    )
    for name, low, high, closed in limits:
        value = getattr(recipe, name)
        if not is_number(value) or not (low <= value < high if closed else low < value < high):
            raise FanalError(f"{name} must be in {'[' if closed else '('}{low}, {high}), got {value!r}")
    profiles(recipe.ema)
    if len(recipe.betas) != 2 or not all(is_number(b) and 0 <= b < 1 for b in recipe.betas):
        raise FanalError(f"betas must be two numbers in [0, 1), got {recipe.betas!r:.80}")
    if recipe.sigma_data is not None and not (is_number(recipe.sigma_data) and 0 < recipe.sigma_data < math.inf):
        raise FanalError(f"sigma_data must be positive or None, got {recipe.sigma_data!r}")
    ends = is_number(recipe.sigma_min) and is_number(recipe.sigma_max)
    if not ends or not 0 < recipe.sigma_min < recipe.sigma_max < math.inf:
        raise FanalError(f"0 < sigma_min < sigma_max is needed, got {recipe.sigma_min!r} and {recipe.sigma_max!r}")


_IMAGES = LogNormal(-0.4, 1.3)

_GRID2 = Recipe(
    "grid2",
    MLPConfig(),
    iterations=8500,
    batch=256,
    learning_rate=3e-3,
    noise_levels=LogNormal(-0.5, 1.4),
    train_count=100_000,
    held_out_count=2048,
)
_HANDS32 = Recipe("hands32", UNetConfig(), iterations=16_000, noise_levels=_IMAGES, train_count=20_000)
_SCENES64 = Recipe(
    "scenes64",
    UNetConfig(widths=(32, 48, 64, 96), embedding=64),
    iterations=20000,
    batch=16,
    noise_levels=LogNormal(-0.2, 1.3),
    train_count=20_000,
)
_SHAPES32 = Recipe("shapes32", UNetConfig(), iterations=2100, noise_levels=_IMAGES, train_count=20_000)

RECIPES: dict[str, Recipe] = {
    "grid2": _GRID2,
    "shapes32": _SHAPES32,
    "hands32": _HANDS32,
    "scenes64": _SCENES64,
    "digits8": Recipe(
        "digits8",
        UNetConfig(widths=(32, 48), factor=1),
        iterations=3000,
        batch=64,
        noise_levels=LogNormal(-0.8, 1.2),
        conditional=True,
        label_dropout=0.1,
    ),
    "shapes32-long": dataclasses.replace(_SHAPES32, iterations=8400),
    "hands32-long": dataclasses.replace(_HANDS32, iterations=24_000),
}
