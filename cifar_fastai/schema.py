"""What the JSON files of a run and of an export hold: each field, its type, its range and its meaning.

Whatever reads these files reads them through here, and so does whatever writes them. A file format is closed: a field that
does not stand here is refused.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    WrapValidator,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cifar_fastai.errors import LONGEST_SHOWN, ExportError, UserError, shown
from cifar_fastai.labels import MAX_CLASSES, MAX_NAME
from cifar_fastai.manifest import CONFIG, MB, READ_SCHEMAS, parse_json, read_limited, to_json
from cifar_fastai.models import TTA_VIEWS
from cifar_fastai.recipes import MAX_INPUT_SIZE, MAX_SIZE, NAME, Recipe
from cifar_fastai.terminal import printable

METRICS, CORRUPTIONS = "metrics.json", "corruptions.json"
LIMITS = {CONFIG: MB, CORRUPTIONS: MB, METRICS: 16 * MB}  # bytes; a matrix of MAX_CLASSES classes takes most of it
HIGHEST_LOSS = 1e40  # more than a float32 can hold


def must_be(words: str) -> WrapValidator:
    """Has an error say what a value must be, in these words, whatever is wrong with it."""

    def validate(value, handler):
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("must_be", "{words}", {"words": words}) from None

    return WrapValidator(validate)


def about(words: str, **settings) -> Any:
    """A field and its meaning. settings: of pydantic's Field, such as the default that stands in for older versions'."""
    return Field(description=words, **settings)


def _has_no_control(also: str = "") -> AfterValidator:
    """Text fit to be shown: control characters could rule a terminal."""

    def check(text: str) -> str:
        if printable(rest := text.translate(dict.fromkeys(map(ord, also)))) != rest:
            raise ValueError
        return text

    return AfterValidator(check)


def _check_all_differ(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError
    return values


_anything, _all_differ = AfterValidator(lambda values: values), AfterValidator(_check_all_differ)


def _number(words: str, **bounds) -> Any:
    return Annotated[float, Field(**bounds), must_be(words)]


def _whole(low: int, high: int) -> Any:
    return Annotated[
        int, Field(ge=low, le=high), must_be(f"a whole number from {low:,} to {'10^15' if high == 10**15 else f'{high:,}'}")
    ]


def _list(kind, words: str, most: int, least: int = 0, check=_anything) -> Any:
    return Annotated[list[kind], Field(min_length=least, max_length=most), FailFast(), check, must_be(words)]


def _table(kind, most: int) -> Any:
    return Annotated[list[kind], Field(max_length=most), FailFast()]


Line = Annotated[
    str, Field(min_length=1, max_length=MAX_NAME), _has_no_control(), must_be(f"a line of 1 to {MAX_NAME} characters")
]
LongLine = Annotated[str, Field(max_length=32_000), _has_no_control(), must_be("a line of text")]
Text = Annotated[str, Field(max_length=32_000), _has_no_control("\n\t"), must_be("text without control characters")]
Name = Annotated[
    str, Field(pattern=rf"\A(?:{NAME})\z"), must_be("up to 100 letters, digits, '.', '_' and '-', a letter or digit first")
]
Sha256 = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z"), must_be("a sha256, 64 hexadecimal digits")]
Digest = Annotated[str, Field(max_length=MAX_NAME), _has_no_control(), must_be("a digest")]
Device = Annotated[Literal["cuda", "mps", "cpu"], must_be("cuda, mps or cpu")]
Flag = Annotated[bool, must_be("true or false")]

Share = _number("a share from 0 to 1", ge=0, le=1)
RoundedShare = _number("a share from 0 to 1", ge=0, le=1 + 1e-6)  # a mean of float32, which may round upwards
Amount = _number("a number from 0 to 10^15", ge=0, le=1e15)
Loss = _number("a number, 0 or more", ge=0, le=HIGHEST_LOSS)
Above0 = _number("a number above 0", gt=0, le=1e40)
Count = _whole(0, 10**15)
AtLeast1 = _whole(1, 10**15)
Images = _whole(1, 10**9)
Epochs = _whole(1, 10**9)
Seed = _whole(0, (1 << 32) - 1)  # NumPy's generators take 32 bits
Processes = _whole(1, 10_000)

Kinds = Annotated[dict[Line, _list(Share, "five shares from 0 to 1", most=5, least=5)], Field(max_length=100)]
Spread = _list(
    Annotated[float, Field(ge=-1, le=2)], "two numbers from -1 to 2", most=2, least=2
)  # by the normal distribution
Interval = _list(Share, "two shares from 0 to 1", most=2, least=2)
Classes = _list(Line, f"2 to {MAX_CLASSES:,} different names of up to {MAX_NAME} characters", MAX_CLASSES, 2, _all_differ)
Matrix = _list(
    Annotated[list[Annotated[int, Field(ge=0, le=10**9)]], Field(max_length=MAX_CLASSES), FailFast()],
    "a table of counts", most=MAX_CLASSES,
)  # fmt: skip
Versions = Annotated[dict[Line, Line], Field(max_length=100), must_be("names of packages with their versions")]
Channels = _list(Annotated[float, Field(ge=-1000, le=1000)], "three numbers from -1000 to 1000", most=3, least=3)
Spreads = _list(Annotated[float, Field(gt=0, le=1000)], "three numbers above 0", most=3, least=3)
Views = _list(
    Literal["mirror", "shift"], "a list of different ones of 'mirror' and 'shift'", len(TTA_VIEWS), 0,
    _all_differ,
)  # fmt: skip
Trackers = _list(Literal["tensorboard", "wandb"], "a list of 'tensorboard' and 'wandb'", most=2)


class Closed(BaseModel):
    """A JSON object with these fields and no others, each of its very type (an int is a float too)."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _told(words: str) -> PydanticCustomError:
    return PydanticCustomError("told", "{words}", {"words": words})


# --- a run's config.json -----------------------------------------------------------------------------------------

_KINDS: dict[object, Any] = {
    str: Text,
    int: _whole(-(10**9), 10**9),
    float: _number("a number"),
    bool: Flag,
    tuple[float, float, float]: _list(float, "three numbers", most=3, least=3),
}


class _RecipeFields(Closed):
    @model_validator(mode="before")
    @classmethod
    def of_older_versions(cls, fields):
        if isinstance(fields, dict) and type(fields.get("flip")) is bool:
            return {**fields, "flip": "random" if fields["flip"] else "off"}
        return fields

    @model_validator(mode="after")
    def in_range(self):
        try:
            to_recipe(self.model_dump())
        except UserError as error:
            raise _told(f": {str(error)[:200].rstrip('.')}") from None  # it quotes what is wrong
        return self


def _default(field: dataclasses.Field) -> dict:
    if field.default is dataclasses.MISSING:
        return {}
    return {"default": list(field.default) if isinstance(field.default, tuple) else field.default}


RecipeFields = create_model(
    "RecipeFields",
    __base__=_RecipeFields,
    **{
        field.name: (
            Name if field.name == "name" else _KINDS[field.type],
            about("see recipes.Recipe", **_default(field)),
        )
        for field in dataclasses.fields(Recipe)
    },
)


def to_recipe(fields: dict) -> Recipe:
    """The recipe of a config.json's `recipe`. Raises UserError if a value is out of range."""
    return Recipe(**{**fields, "moms": tuple(fields["moms"])})


class RunConfig(Closed):
    """A run's config.json: the whole configuration, enough to repeat the run."""

    name: Name = about("of the run and of its export")
    recipe: RecipeFields = about("every field of the recipe")
    data: LongLine = about("the source, as for --data; only ever read")
    fingerprint: Sha256 | None = about(
        "sha256 of the pixels; None: of an older version, which cannot be resumed", default=None
    )
    initial_weights: LongLine = about("where the network's weights came from", default="from scratch")
    seed: Seed = about("of every random choice")
    subset: Images | None = about("number of images trained on; None: all", default=None)
    device: Device = about("what it is trained on")
    deterministic: Flag = about("whether the operations give the same bits on a GPU too", default=False)
    trackers: Trackers = about("what it is logged to", default=[])
    command: LongLine = about("that repeats the run", default="")
    processes: Processes = about("that train together", default=1)
    versions: Versions = about("of Python and the packages that decide a result")


# --- tables of figures -------------------------------------------------------------------------------------------


class ClassFigures(Closed):
    """One class on the test split."""

    recall: Share = about("share of its images that were recognised")
    precision: Share = about("share right of the answers that named it")
    f1: Share = about("harmonic mean of both", default=0.0)
    support: Count = about("number of its images")


class ConfidenceBin(Closed):
    """A bin of confidence that holds images."""

    count: AtLeast1 = about("number of images")
    confidence: RoundedShare = about("their mean confidence")
    accuracy: Share = about("share of them that was right")


class Coverage(Closed):
    """What is left when only confident answers count."""

    threshold: Share = about("the lowest confidence that counts")
    coverage: Share = about("share of the images that reach it")
    accuracy: Share | None = about("share right of those; None if there are none")


class ConfusedPair(Closed):
    """A common mistake."""

    class_: Line = about("what was shown", alias="class")
    taken_for: Line = about("what was answered")
    count: AtLeast1 = about("how often")
    share: Share = about("of the images of the class")


class TestFigures(Closed):
    """The figures of an export on its test split."""

    __test__ = False  # no test of pytest's

    test_accuracy: Share = about("share of the test images that were recognised")
    test_accuracy_interval: Interval = about("its 95 % interval")
    test_accuracy_tta: Share = about("the same with test-time augmentation")
    test_loss: Loss = about("mean cross-entropy of the calibrated confidences")
    ece: RoundedShare = about("expected calibration error")
    reliability: _table(ConfidenceBin, 1000) = about("accuracy by bins of confidence", default=[])
    per_class: Annotated[dict[Line, ClassFigures], Field(max_length=MAX_CLASSES)] = about("figures by class")
    confusion_matrix: Matrix = about("counts, rows true and columns predicted")
    risk_coverage: _table(Coverage, 1000) = about("accuracy by thresholds of confidence")
    false_alarm_rate: Share = about("share of the test images called unlike the training images")


EXPORTED_FIGURES = tuple(TestFigures.model_fields)


def _check_tables(figures, classes: list[str]) -> None:
    """Raises unless the tables are of these classes."""
    for name in ("per_class", "per_class_accuracy"):
        table = getattr(figures, name, None)
        if table is not None and table.keys() != set(classes):
            raise _told(f"{name} must have a row for each class, and no others")
    matrix = figures.confusion_matrix
    if [len(row) for row in matrix] != [len(classes)] * len(classes):
        raise _told("confusion_matrix must have a row and a column for each class")


# --- a run's metrics.json ----------------------------------------------------------------------------------------


class DataFigures(Closed):
    """The data of a run."""

    source: LongLine = about("what it is called")
    encoding: Line = about("of the image files")
    sha256: Digest | None = about("of the file it came from, if it was one")
    n_files: Count | None = about("number of image files, where it was a folder", default=None)
    fingerprint: Digest = about("sha256 of the pixels")
    n_train: Images = about("images trained on")
    n_valid: Images = about("images that chose the epoch and the calibration")
    n_test: Images = about("images it was judged on")


class Metrics(TestFigures):
    """A run's metrics.json: what came out, what it cost and where it was made. Older versions' lack what has a default."""

    test_accuracy_interval: Interval = about("its 95 % interval", default=None)
    test_accuracy_tta_interval: Interval = about("95 % interval of the accuracy with test-time augmentation", default=None)
    test_top2_accuracy: Share = about("share of the test images whose class is among the two likeliest", default=None)
    temperature: Above0 = about("divides the logits before they become confidences", default=None)
    test_loss_uncalibrated: Loss = about("test loss without the temperature", default=None)
    ece_uncalibrated: RoundedShare = about("calibration error without the temperature", default=None)
    per_class_accuracy: Annotated[dict[Line, Share], Field(max_length=MAX_CLASSES)] = about("recall by class")
    per_class: Annotated[dict[Line, ClassFigures], Field(max_length=MAX_CLASSES)] = about("figures by class", default=None)
    confused_pairs: _table(ConfusedPair, 1000) = about("the commonest mistakes", default=[])
    risk_coverage: _table(Coverage, 1000) = about("accuracy by thresholds of confidence", default=[])
    false_alarm_rate: Share = about("share of the test images called unlike the training images", default=None)
    valid_accuracy: Share = about("share of the validation images that were recognised, at the best epoch")
    valid_accuracy_interval: Interval = about("its 95 % interval", default=None)
    valid_loss: Loss = about("mean cross-entropy on the validation images")
    classes: Classes = about("their names, by number")
    unfamiliar_below: Loss = about("familiarity below which an image is called unlike the training images", default=None)
    n_params: AtLeast1 = about("weights of the network")
    weights: LongLine = about("where they came from", default="from scratch")
    flops_per_image: Count = about("floating-point operations for one image", default=0)
    epochs_run: Epochs = about("epochs that were trained")
    best_epoch: Epochs = about("the epoch, counted from 1, whose weights were kept")
    train_accuracies: _list(Share, "a list of shares", most=1_000_000) = about(
        "of each epoch: share of the augmented training images that were recognised", default=[]
    )
    train_seconds: Amount = about("that the training took")
    images_per_second: Amount = about("training images")
    peak_memory_mb: Amount | None = about("the most memory in use, in 10^6 bytes; None where it cannot be told")
    data: DataFigures = about("the data")
    versions: Versions = about("of Python and the packages that decide a result")
    device: Device = about("what it was trained on")
    precision: Line = about("that it was computed in", default="float32")
    hardware: Line = about("the device in words")
    processes: Processes = about("that trained together", default=1)
    seed: Seed = about("of every random choice")
    git_commit: Line | None = about("the program's version; None where it is not known")
    evaluated_at_commit: Line | None = about("the program's version that made the figures anew", default=None)
    export: LongLine = about("the export; it is there once the run is finished", default=None)

    @model_validator(mode="after")
    def tables_are_of_the_classes(self):
        _check_tables(self, self.classes)
        if sum(map(sum, self.confusion_matrix)) != self.data.n_test:
            raise _told("confusion_matrix must hold the data.n_test test images, class by class")
        return self


# --- a run's corruptions.json ------------------------------------------------------------------------------------


class Corruptions(Closed):
    """A run's corruptions.json: how it bears corrupted images."""

    source: LongLine = about("what the data is called")
    encoding: Line = about("of the image files")
    n_images: Images = about("test images that were corrupted")
    n_test: Images = about("of how many")
    seed: Seed = about("by which they were drawn")
    clean_accuracy: Share = about("share of them that was recognised as they are")
    clean_accuracy_interval: Interval = about("its 95 % interval")
    mean_corruption_accuracy: Share = about("the same, corrupted, over all kinds and severities")
    mean_corruption_accuracy_interval: Spread = about("its 95 % interval")
    drop: _number("a number from -1 to 1", ge=-1, le=1) = about("how far it lies below the clean accuracy")
    worst_kind: Line = about("the kind of corruption that it bears least")
    kind_accuracy: Annotated[dict[Line, Share], Field(max_length=100)] = about("by kind, over the severities")
    accuracy: Annotated[dict[Line, Kinds], Field(max_length=100)] = about("by group, kind and severity")

    @model_validator(mode="after")
    def kinds_are_the_same(self):
        if {kind for kinds in self.accuracy.values() for kind in kinds} != self.kind_accuracy.keys():
            raise _told("accuracy must hold the kinds of kind_accuracy")
        return self


# --- an export's config.json -------------------------------------------------------------------------------------


class TrainingFigures(Closed):
    """How an export was trained."""

    recipe: Name = about("its name")
    data: LongLine = about("the training data in words")
    weights: LongLine = about("where the network's weights came from", default="from scratch")
    n_params: AtLeast1 = about("weights of the network")
    epochs_run: Epochs = about("epochs that were trained")
    best_epoch: Epochs = about("the epoch whose weights were kept", default=None)
    seed: Seed = about("of every random choice")
    device: Device = about("what it was trained on", default=None)
    hardware: Line = about("the device in words")
    train_seconds: Amount = about("that the training took")
    git_commit: Line | None = about("the program's version", default=None)


class ExportConfig(Closed):
    """An export's config.json: what has to be known to use it, and what it is worth."""

    schema_: Annotated[Literal[READ_SCHEMAS], must_be(" or ".join(map(str, READ_SCHEMAS)))] = about(
        "version of this file's format", alias="schema"
    )
    name: Name = about("of the export")
    created: Line = about("time in UTC, as 2026-01-31T12:00:00Z")
    model: Line = about("name of the network in the registry")
    classes: Classes = about("their names, by number")
    size: _whole(16, MAX_SIZE) = about("side of the images in pixels")
    input_size: _whole(16, MAX_INPUT_SIZE) = about("side to which the network enlarges them")
    mean: Channels = about("of red, green and blue, subtracted from pixels between 0 and 1")
    std: Spreads = about("of the same, by which they are divided")
    temperature: Above0 = about("divides the logits before they become confidences")
    unfamiliar_below: Loss = about("familiarity below which an image is called unlike the training images")
    tta_views: Views = about("what test-time augmentation averages over, beside the image itself")
    training: TrainingFigures = about("how it was trained")
    test: TestFigures = about("its figures on the test split")
    versions: Versions = about("of Python and the packages that decide a result")

    @model_validator(mode="before")
    @classmethod
    def of_older_versions(cls, fields):
        if not isinstance(fields, dict):
            return fields
        older = {"input_size": fields.get("size")}  # networks that take images as they are
        if fields.get("schema") == 3:
            older["tta_views"] = list(TTA_VIEWS)
        return older | fields

    @field_validator("input_size")
    @classmethod
    def no_smaller_than_the_images(cls, side, info):
        if side < info.data.get("size", 0):
            raise _told("input_size must be no smaller than size")
        return side

    @model_validator(mode="after")
    def tables_are_of_the_classes(self):
        _check_tables(self.test, self.classes)
        return self


# --- checking ----------------------------------------------------------------------------------------------------


def checked(kind: type[BaseModel], where: str, content: dict, whole: bool = False) -> dict:
    """The content of a file, if it is one of its kind, as plain data. whole: with the defaults of what is missing.

    where: the file, for the error. Raises UserError, in one line that names the field.
    """
    try:
        found = kind.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {_in_words(error)}.") from None
    return found.model_dump(by_alias=True, exclude_unset=not whole)


def _in_words(error: ValidationError) -> str:
    """The first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"] if part != "[key]"]
    field = ".".join(
        part if part.replace("-", "").isalnum() or (part.isidentifier() and len(part) < LONGEST_SHOWN) else shown(part)
        for part in parts
    )
    match first["type"]:
        case "missing":
            return f"{field} is missing"
        case "extra_forbidden":
            return f"{field} is no field that this version knows"
        case "must_be":
            instead = "" if isinstance(first["input"], dict | list) else f", not {shown(first['input'])}"
            return f"{field} must be {first['msg']}{instead}"
        case "told":
            return f"{field}{first['msg']}" if first["msg"].startswith(":") else first["msg"]
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"{field} must hold fields, not {shown(first['input'])}"
        case "list_type":
            return f"{field} must be a list, not {shown(first['input'])}"
        case _:
            return f"{field}: {first['msg'][:100]}"


def read(kind: type[BaseModel], path: Path, whole: bool = False) -> dict:
    """As `checked`, from a file. Raises UserError, and OSError if it cannot be read."""
    data = read_limited(path, LIMITS[path.name])
    if len(data) > LIMITS[path.name]:
        raise UserError(f"{path} is damaged (it is far too long).")
    try:
        content = parse_json(str(path), data)
    except ExportError as error:
        raise UserError(str(error)) from None
    return checked(kind, str(path), content, whole)


def written(kind: type[BaseModel], where: str, value: dict) -> bytes:
    """The bytes of a file that `read` takes. where: what it is called in the UserError that is raised if it would not."""
    try:
        data = to_json(value)
        checked(kind, where, parse_json(where, data))
    except UnicodeEncodeError:
        raise UserError(f"{where} cannot hold a name that is not Unicode: rename the file or folder it is of.") from None
    except ExportError as error:
        raise UserError(str(error)) from None
    return data
