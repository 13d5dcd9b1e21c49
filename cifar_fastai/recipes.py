"""Recipes: every hyperparameter of a training in one frozen object, the named sets of them, and recipes as files."""

import dataclasses
import difflib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cifar_fastai.errors import UserError, shown
from cifar_fastai.tomlfiles import read_toml, to_toml

MIN_VALID_PCT, MAX_VALID_PCT = 0.10, 0.20
DESCRIPTION = ("name", "about", "measured")  # fields of a recipe that change no training
MIN_SIZE, MAX_SIZE = 32, 128
MAX_INPUT_SIZE = 512
AUGMENTATION_LIMITS = {  # beyond which the arithmetic makes no image any more
    "crop_pad": 16, "rotate": 180, "translate": 0.5, "scale": 0.9, "perspective": 0.9, "brightness": 1, "contrast": 1,
    "saturation": 1, "cutout": 32, "mixup": 100, "cutmix": 100,
}  # fmt: skip
MANY_IMAGES = 20_000  # of which batches of 1024 make the five hundred steps in 30 epochs that airbench94 needs
MOST_EPOCHS = 100_000
FLIPS = ("random", "alternating", "off")
OPTIMIZERS = ("adam", "sgd", "muon")
MOST_BASES = 10  # of a recipe file, each the base of the one before
LONGEST_TEXT = 4096  # characters of a field of a recipe file
LARGEST = 10**9
PRECISIONS = ("auto", "float32", "bfloat16")
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"  # of a recipe, a run or an export: it becomes a part of folders' names
KINDS: dict[object, str] = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a training, apart from the data, the seed and the device.

    Raises UserError if a value is out of range. `dataclasses.replace` gives a changed copy, `get_recipe` a named one or
    one from a file, `recipe_toml` the file.
    """

    name: str
    about: str = ""
    measured: str = ""  # what the recipe was seen to reach, and where the evidence lies

    # Data
    size: int = 32  # side of the images in pixels; photos are made square
    valid_pct: float = 0.1  # validation share of the training split, stratified by class
    bs: int = 128  # images an optimizer step

    # Model: a name in the registry of models.py, or an architecture of torchvision or timm
    model: str = "small"
    whiten: bool = True  # base and large: a fixed stem that whitens patches; else a random one that is trained
    dirac: bool = True  # base and large: convolutions start as the identity; else at random

    # Architectures of torchvision and timm, which start from weights that others have trained
    pretrained: bool = True  # else at random, and all layers learn at the same rate
    weights: str = ""  # file of the weights, .pth or .safetensors; "": those that torchvision or timm publish
    input_size: int = 64  # side in pixels to which smaller images are enlarged on the device
    frozen_epochs: int = 1  # epochs in which only the new head and the normalisation layers learn
    body_lr_factor: float = 0.01  # the first half of the layers learns at lr times this, the second at its root times lr

    # Augmentation, of the training batches only; every amount is drawn uniformly for each image
    flip: str = "random"  # mirror half of the images; "alternating": all of them every other epoch; "off"
    crop_pad: int = 0  # translation by up to this many whole pixels, the border reflected
    rotate: float = 0.0  # degrees, either way
    translate: float = 0.0  # share of the image's side, either way
    scale: float = 0.0  # zoom by 1 - scale to 1 + scale
    perspective: float = 0.0  # each corner moves inwards by up to this share of half the side
    brightness: float = 0.0  # factor 1 - b to 1 + b; likewise the next two
    contrast: float = 0.0
    saturation: float = 0.0
    trivial_augment: bool = False  # one operation an image, drawn from 14 kinds, of any strength
    cutout: int = 0  # side in pixels of a square painted over with the mean colour
    mixup: float = 0.0  # Beta(a, a) draws the share of another image blended in, and of its label; 0: off
    cutmix: float = 0.0  # likewise the share of the area pasted over; with both, each batch takes either

    # Optimization
    optimizer: str = "adam"  # or "sgd", with Nesterov momentum; "muon": that, with orthogonal steps for convolutions
    lr: float = 1e-3  # the highest learning rate of the one-cycle schedule
    wd: float = 0.0  # L2 weight decay, as torch.optim counts it
    bias_lr_factor: float = 1.0  # BatchNorm biases learn at lr times this (weight decay divided by it)
    muon_lr_factor: float = 1.0  # Muon's convolutions learn at lr times this
    label_smoothing: float = 0.0  # share of the target spread over all classes
    lookahead_steps: int = 0  # steps between pulls towards the slow weights; 0: no lookahead
    whiten_bias_epochs: int = 0  # epochs after which the bias of a whitening stem is frozen; 0: never
    start_size: int = 0  # progressive resizing: side of the training images in the first epochs; 0: always the full size
    grow_pct: float = 0.7  # share of the epochs over which they grow to their full size, by four pixels at a time
    precision: str = "auto"  # "bfloat16": compute in it where that is safe; "float32"; "auto": bfloat16 where made for it

    # One-cycle schedule
    epochs: int = 30
    pct_start: float = 0.25  # share of the schedule that warms up
    div: float = 25.0  # lr / div is the first learning rate
    div_final: float = 1e5  # lr / div_final is the last
    moms: tuple[float, float, float] = (0.95, 0.85, 0.95)  # momentum, or Adam's first beta: start, peak, end

    # Early stopping, from when the learning rate has fallen to half of its peak: before that the validation loss wanders.
    # fastai's default of 1 would still throw away the best epochs; in trainings that ended well up to four went by.
    patience: int = 10  # epochs without a lower validation loss

    def __post_init__(self):
        if not re.fullmatch(NAME, self.name):
            raise UserError(f"name must be up to 100 letters, digits, '.', '_' and '-', not {self.name!r}.")
        if not MIN_VALID_PCT <= self.valid_pct <= MAX_VALID_PCT:
            raise UserError(
                f"valid-pct must lie between {MIN_VALID_PCT:.2f} and {MAX_VALID_PCT:.2f}, not {self.valid_pct:g}: "
                "less makes the choice of the best epoch a lottery, more starves the training."
            )
        if not MIN_SIZE <= self.size <= MAX_SIZE:
            raise UserError(f"size must lie between {MIN_SIZE} and {MAX_SIZE} pixels, not {self.size}.")
        for field, choices in (("flip", FLIPS), ("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            if getattr(self, field) not in choices:
                raise UserError(f"{field} must be one of {', '.join(choices)}, not {getattr(self, field)!r}.")
        for field, most in AUGMENTATION_LIMITS.items():
            if not 0 <= getattr(self, field) <= most:
                raise UserError(f"{field} must lie between 0 and {most:g}, not {getattr(self, field):g}.")
        for field in ("epochs", "bs", "patience"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} must be at least 1, not {getattr(self, field)}.")
        if self.epochs > MOST_EPOCHS:
            raise UserError(f"epochs must be {MOST_EPOCHS:,} at most, not {self.epochs}.")
        if self.weights and not self.pretrained:
            raise UserError("A network that starts from scratch takes no weights: leave one of the two away.")
        if not MIN_SIZE <= self.input_size <= MAX_INPUT_SIZE:
            raise UserError(f"input_size must lie between {MIN_SIZE} and {MAX_INPUT_SIZE} pixels, not {self.input_size}.")
        if self.frozen_epochs < 0:
            raise UserError(f"frozen_epochs must be zero or more, not {self.frozen_epochs}.")
        if not 0 < self.body_lr_factor <= 1:
            raise UserError(f"body_lr_factor must lie above 0, up to 1, not {self.body_lr_factor:g}.")
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr must be a positive number, not {self.lr:g}; the recipes use 0.001 to 1.5.")
        if not 0 <= self.wd < math.inf:
            raise UserError(f"wd must be zero or a positive number, not {self.wd:g}.")
        if self.start_size and not 16 <= self.start_size <= self.size:
            raise UserError(f"start_size must be 0 or lie between 16 and the size, {self.size}, not {self.start_size}.")
        for field in ("grow_pct", "pct_start"):
            if not 0 < getattr(self, field) < 1:
                raise UserError(f"{field} must lie between 0 and 1, not {getattr(self, field):g}.")
        for field in ("div", "div_final", "bias_lr_factor", "muon_lr_factor"):
            if not 0 < getattr(self, field) < math.inf:
                raise UserError(f"{field} must be a positive number, not {getattr(self, field):g}.")
        for field in ("lookahead_steps", "whiten_bias_epochs"):
            if getattr(self, field) < 0:
                raise UserError(f"{field} must be zero (off) or more, not {getattr(self, field)}.")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must be at least 0 and less than 1, not {self.label_smoothing:g}.")
        if not (len(self.moms) == 3 and all(0 <= momentum < 1 for momentum in self.moms)):
            raise UserError(f"moms must be three numbers of at least 0 and less than 1, not {list(self.moms)}.")


# Keller Jordan's airbench94 (https://arxiv.org/abs/2404.00498): network, initialisation, learning rates,
# label smoothing and lookahead are his; the cosine schedule is fastai's.
FAST = Recipe(
    name="fast",
    about="whitened stem, Dirac initialisation and high learning rates (after airbench94); made for a GPU",
    measured="89.68 % on CIFAR-10's test split, 90.73 % with TTA (JPEG copy, 12 epochs, n=1, results/fast)",
    bs=1024,
    model="base",
    crop_pad=2,
    optimizer="sgd",
    lr=1.5,
    wd=1.33e-3,
    bias_lr_factor=64.0,
    label_smoothing=0.2,
    lookahead_steps=5,
    whiten_bias_epochs=3,
    pct_start=0.23,
    div=5.0,
    div_final=14.0,
    moms=(0.85, 0.85, 0.85),
)

# As fast, in batches that fit a CPU's caches, which run faster there than batches of 1024; learning rate and steps between
# lookaheads are scaled with the batch. Flip, translation and the third convolution are airbench96's. Muon's learning rate
# was chosen by short trainings, network and cutout by validation loss over 30 epochs (results/README.md).
CPU = dataclasses.replace(
    FAST,
    name="cpu",
    about="the network of `fast` with a third convolution a group, trained longer, with Muon, on images that grow; "
    "made for a CPU",
    measured="91.52 % on CIFAR-10's test split, 92.33 % with TTA (JPEG copy, 30 epochs, n=1, results/cpu)",
    bs=128,
    model="deep",
    optimizer="muon",
    lr=0.1875,
    muon_lr_factor=0.2,
    lookahead_steps=40,
    flip="alternating",
    crop_pad=4,
    cutout=8,
    start_size=24,
    pct_start=0.15,
    div_final=1000.0,
)

SLIM = dataclasses.replace(
    CPU,
    name="slim",
    about="as `cpu`, with a narrower network (1.3 M parameters): for slow CPUs",
    measured="89.77 % on CIFAR-10's test split, 91.14 % with TTA (JPEG copy, 30 epochs, n=2, results/slim)",
    model="slim",
)

SHORT = dataclasses.replace(
    CPU,
    name="short",
    about="as `cpu`, but made for 5 to 15 epochs: the smaller network, less translation, no cutout",
    measured="89.65 % on CIFAR-10's test split, 90.34 % with TTA (JPEG copy, 10 epochs, n=1, results/short)",
    model="base",
    crop_pad=2,
    cutout=0,
    grow_pct=0.5,
)

# Keller Jordan's airbench96, its wider network; as above the schedule is fastai's.
LARGE = dataclasses.replace(
    FAST,
    name="large",
    about="a wide network (12.7 M parameters) on strongly varied images, to be as accurate as can be (after airbench96); "
    "made for a GPU",
    measured="not measured here yet; airbench96 reaches 96.0 % with TTA on the lossless images",
    model="large",
    flip="alternating",
    crop_pad=4,
    cutout=12,
    lr=1.174,
    pct_start=0.1,
    div=25.0,
    div_final=1000.0,
)

# Mirrored digits are none. After few epochs hardly anything is left to learn, so that the training may end early. Network,
# optimizer and augmentation were chosen by validation (results/README.md).
DIGITS = Recipe(
    name="digits",
    about="the textbook CNN on images that are shifted and turned a little, but not mirrored: for scikit-learn's digits",
    measured="99.83 % on the held-out fifth of scikit-learn's digits (30 epochs or fewer, n=5, results/digits)",
    model="small",
    flip="off",
    crop_pad=1,
    rotate=10.0,
    lr=3e-3,
    pct_start=0.15,
    patience=4,
)

# fastai's `fine_tune` (J. Howard and S. Gugger, https://arxiv.org/abs/2002.04688) in one cycle instead of two: the head
# warms up in the frozen epochs, so that history, best epoch and early stopping span the whole training. Learning rates,
# their spread over the layers and the share of the warm-up are those of its second cycle.
TRANSFER = Recipe(
    name="transfer",
    about="a network that others trained on ImageNet: at first its new head alone, then all of it, gently",
    model="resnet18",
    crop_pad=4,
    lr=1e-3,
    pct_start=0.3,
    div=5.0,
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="classic-adam",
            about="the textbook CNN as most tutorials train it: Adam, flip and rotation, 80/20 split",
            measured="84.29 % on CIFAR-10's test split, 85.33 % with TTA (JPEG copy, 30 epochs, n=1, results/classic-adam)",
            valid_pct=0.2,
            model="small",
            rotate=10.0,
            optimizer="adam",
            lr=1e-3,
        ),
        Recipe(
            name="classic-sgd",
            about="the same CNN with SGD and every classic augmentation: affine, perspective, colour jitter; 90/10 split",
            measured="84.54 % on CIFAR-10's test split, 85.58 % with TTA (JPEG copy, 30 epochs, n=1, results/classic-sgd)",
            model="small",
            rotate=10.0,
            translate=0.1,
            scale=0.1,
            perspective=0.2,
            brightness=0.2,
            contrast=0.2,
            saturation=0.2,
            optimizer="sgd",
            lr=0.1,
            wd=5e-4,
        ),
        FAST,
        CPU,
        SLIM,
        SHORT,
        LARGE,
        DIGITS,
        TRANSFER,
    )
}


def nearest(word: str, words) -> str:
    """A hint such as " Did you mean 'fast'?" when one of `words` resembles `word`, else an empty string."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def get_recipe(name: str | os.PathLike, /, **overrides) -> Recipe:
    """A recipe with any field overridden: `get_recipe("fast", epochs=10, bs=512)`.

    name: a named recipe, or the path of a recipe file, as a string ending in .toml or as a Path. Raises UserError for an
    unknown recipe or field or a value out of range, and for a file that cannot be used.
    """
    if is_file_name(name):
        recipe = _read_recipe(Path(name))
    elif name in RECIPES:
        recipe = RECIPES[name]
    else:
        there = f"There are: {', '.join(RECIPES)}; a path that ends in .toml names a file."
        raise UserError(f"There is no recipe {name!r}.{nearest(str(name), RECIPES)} {there}")
    for field in overrides:
        _check_field(field)
    return dataclasses.replace(recipe, **overrides)


def is_file_name(name: str | os.PathLike) -> bool:
    """Whether this names a recipe file, and not one of RECIPES."""
    return isinstance(name, os.PathLike) or name.endswith(".toml")


def recipe_toml(recipe: Recipe) -> str:
    """A recipe file with every field, from which `get_recipe` makes the same recipe again."""
    return to_toml(dataclasses.asdict(recipe))


def _read_recipe(path: Path, heirs: tuple[Path, ...] = ()) -> Recipe:
    """The recipe in a file: its fields over those of its base, a named recipe or another file, or over the defaults.

    A base's name, description and figures are its own, so they are not inherited. heirs: the files that led here.
    """
    if path.resolve() in heirs:
        raise UserError(f"{path}: its base leads back to itself.")
    if len(heirs) >= MOST_BASES:
        raise UserError(f"{path}: it is the base of a base, and so on, of more than {MOST_BASES} recipes.")
    values = read_toml(path)
    base = values.pop("base", None)
    try:
        if base is None:
            recipe = Recipe(name="defaults")
        elif type(base) is not str:
            raise UserError(f"base must be the name of a recipe or a file ending in .toml, in quotes, not {shown(base)}.")
        elif base.endswith(".toml"):
            recipe = _read_recipe(path.parent / base, (*heirs, path.resolve()))
        else:
            recipe = get_recipe(base)
        fields = {field: _typed(field, value) for field, value in values.items()}
        return dataclasses.replace(recipe, **{"name": path.stem, "about": "", "measured": "", **fields})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _check_field(name: str) -> None:
    fields = [field.name for field in dataclasses.fields(Recipe)]
    if name not in fields:
        raise UserError(f"A recipe has no field {shown(name)}.{nearest(name[:100], fields)}")


def _typed(name: str, value):
    """A field's value from a file, of the field's type. Raises UserError."""
    _check_field(name)
    (kind,) = (field.type for field in dataclasses.fields(Recipe) if field.name == name)
    if kind is float and _is_number(value):
        return float(value)
    if kind is int and type(value) is int and abs(value) > LARGEST:
        raise UserError(f"{name} must be a whole number up to {LARGEST:,}.")
    if kind is str and type(value) is str and len(value) > LONGEST_TEXT:
        raise UserError(f"{name} must be text of up to {LONGEST_TEXT:,} characters.")
    if kind in KINDS and type(value) is kind:  # type() and not isinstance(), since True is an int too
        return value
    if kind not in KINDS and isinstance(value, list) and all(map(_is_number, value)):
        return tuple(map(float, value))
    raise UserError(f"{name} must be {KINDS.get(kind, 'three numbers in brackets')}, not {shown(value)}.")


def _is_number(value) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1e300)  # what a float can hold


def search_space(recipe: Recipe) -> dict[str, tuple[float, float, bool]]:
    """The fields worth tuning: the lowest and highest value to try, and whether to search evenly by the logarithm."""
    return {
        "lr": (recipe.lr / 10, recipe.lr * 10, True),  # what is high depends on optimizer and batch
        "wd": (1e-5, 1e-2, True),
        "pct_start": (0.1, 0.5, False),
        "label_smoothing": (0.0, 0.3, False),
        "crop_pad": (0, 6, False),
        "cutout": (0, 16, False),
    }


def auto_recipe(
    device_type: str, model: str | None = None, n_images: int | None = None, source: str = ""
) -> tuple[str, str]:
    """The recipe that suits a device ("cuda", "mps" or "cpu"), the model that was asked for, the number of training images,
    where that is known, and their source; and the reason in words."""
    if source == "digits" and model is None:
        return "digits", "made for them"
    if model == "small":
        return "classic-sgd", "made for the small network"
    if model not in (None, "base", "slim", "deep", "large"):
        return "transfer", "made for networks that others have trained"
    if device_type == "cpu":
        return "cpu", "the most accurate one made for a CPU; --recipe short --epochs 10 takes a quarter of 30 epochs' time"
    if n_images is not None and n_images < MANY_IMAGES:
        return "cpu", f"its batches of {CPU.bs} make enough steps of {n_images:,} images"
    if device_type == "cuda" and model != "base":
        return "large", "made to be as accurate as a GPU's speed allows"
    return "fast", "made for an accelerator, and there is one"
