"""Exports: a trained network as plain data that can be checked, and the way back to a learner that runs none of it."""

import errno
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cifar_fastai.errors import ExportError, ExportWarning, UserError, first_line, shown
from cifar_fastai.manifest import (
    CARD,
    CONFIG,
    MANIFEST,
    PICKLE,
    PROBE,
    SCHEMA,
    SHA256,
    WEIGHTS,
    Sealed,
    check_is_export,
    check_schema,
    open_sealed,
    parse_json,
    write_manifest,
)
from cifar_fastai.models import MODELS, TTA_VIEWS, Views, create_model, familiarity, misfit, n_views
from cifar_fastai.recipes import NAME
from cifar_fastai.schema import ExportConfig, checked, written
from cifar_fastai.terminal import markdown, printable

PROBE_IMAGES, PROBE_SEED = 8, 0
PROBE_NOISE, PROBE_LIMIT = 1e-5, 1e-4  # what other versions may change in silence, and at all
PROBE_PARTS = ("images", "probabilities", "scores")
HOW_TO_GET_ONE = (
    "Train one with `python train.py` (installed: `cifar-fastai train`), or name one with --export; the project's "
    "repository has exports/cifar10."
)


@dataclass(frozen=True)
class Export:
    """A loaded export: the network in evaluation mode, and what has to be known to use it."""

    folder: Path
    model: nn.Module
    config: dict  # as in config.json
    sealed: Sealed | None = None  # the files it was read from

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config["classes"])

    @property
    def size(self) -> int:
        return self.config["size"]

    @torch.inference_mode()
    def scores(self, images: Tensor, network=None) -> Tensor:
        """Logits over temperature, (N, C), from uint8 images (N, 3, size, size). network: computes the logits; the model
        itself by default."""
        return (network or self.model)(self.normalized(images)) / self.config["temperature"]

    def probabilities(self, images: Tensor, network=None) -> Tensor:
        """Calibrated, (N, C), as `scores`."""
        return self.scores(images, network).softmax(dim=1)

    @torch.inference_mode()
    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`probabilities` and `unfamiliar` of these images, computed together."""
        maps = self.model.maps(self.normalized(images))  # type: ignore[operator]  # torch's own types take any attribute for a Tensor
        scores = self.model.classify(maps) / self.config["temperature"]  # type: ignore[operator]
        return scores.softmax(dim=1), familiarity(maps) < self.config["unfamiliar_below"]

    def unfamiliar(self, images: Tensor) -> Tensor:
        """Whether each of these images, as above, is unlike the training images, (N,) of bool."""
        return self.judge(images)[1]

    def normalized(self, images: Tensor) -> Tensor:
        """What the model takes, from uint8 images."""
        return normalize(images, self.config["mean"], self.config["std"])


def normalize(images: Tensor, mean, std) -> Tensor:
    """Float images from uint8 ones (N, 3, H, W), as IntToFloatTensor and Normalize do it."""
    mean, std = (torch.tensor(stat, dtype=torch.float32).view(1, 3, 1, 1) for stat in (mean, std))
    return (images.float() / 255 - mean) / std


# --- writing -----------------------------------------------------------------------------------------------------


def write_export(folder: Path, learn, *, name: str, created: str, model: str, temperature: float,
                 unfamiliar_below: float, training: dict, test: dict, versions: dict,
                 tta_views: Views = TTA_VIEWS) -> str:  # fmt: skip
    """Write the export of a trained fastai learner to `folder`, replacing what was there in one step; returns its digest.

    model: its name in the registry. temperature: divides the logits before they become confidences. unfamiliar_below: the
    familiarity that an image like the training images has. training, test: figures for config.json and the model card.
    tta_views: those of TTA_VIEWS that test-time augmentation averages over.
    Raises OSError, with the folder's path, and UserError if something else than an export is there.
    """
    from safetensors.torch import save

    normalize_tfm, size = learn.dls.valid.after_batch.normalize, learn.dls.data.size
    config = {
        "schema": SCHEMA, "name": name, "created": created, "model": model, "classes": list(learn.dls.vocab),
        "size": size, "input_size": getattr(learn.model, "side", size), "mean": normalize_tfm.mean.flatten().tolist(),
        "std": normalize_tfm.std.flatten().tolist(), "temperature": temperature, "unfamiliar_below": unfamiliar_below,
        "tta_views": list(tta_views), "training": training, "test": test, "versions": versions,
    }  # fmt: skip
    check_replaceable(folder)
    config_file = written(ExportConfig, str(folder / CONFIG), config)
    network = learn.model.cpu().eval()
    export = Export(folder, network, config)
    probe = probe_images(config["size"])
    probe_file = io.BytesIO()
    scores = export.scores(probe)
    np.savez(probe_file, images=probe.numpy(), probabilities=scores.softmax(dim=1).numpy(), scores=scores.numpy())
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
            scratch = Path(made)
            (scratch / WEIGHTS).write_bytes(save(weights))
            (scratch / CONFIG).write_bytes(config_file)
            (scratch / PROBE).write_bytes(probe_file.getvalue())
            (scratch / CARD).write_text(model_card(config), encoding="utf-8")
            _export_pickle(export, scratch / PICKLE)
            digest = write_manifest(scratch)
            _replace_folder(scratch, folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None
    return digest


def _export_pickle(export: Export, path: Path) -> None:
    learn = _learner(export)  # the trained one would bring its split and a record of every step along
    try:
        learn.export(path)
    except RuntimeError as error:  # which is how torch says that a file could not be written
        raise OSError(errno.ENOSPC, first_line(error)) from None


def check_target(exports: Path, name: str, n_bytes: int = 0) -> Path:
    """The folder in `exports` that an export called `name` is to be written to.

    n_bytes: that it takes. Raises UserError for what would hinder it: another thing of that name, no leave to write there,
    no room. To be called before the work that an export is the end of.
    """
    if not re.fullmatch(NAME, name):
        raise UserError(f"An export cannot be called {shown(name)}: use up to 100 letters, digits, '.', '_' and '-'.")
    check_replaceable(exports / name)
    place = exports
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=f".{name}-"):
            pass
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise UserError(f"The export {exports / name} could not be written: {error.strerror or error}.") from None
    if free < n_bytes:
        needed = f"it takes about {n_bytes / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free"
        raise UserError(f"There is no room for the export {exports / name}: {needed}.")
    return exports / name


def check_replaceable(folder: Path) -> None:
    """Raises UserError if something else than an export is there, which would be lost."""
    if os.path.lexists(folder):
        try:
            check_is_export(folder)
        except ExportError as error:
            reason = str(error).rstrip(".")
            raise UserError(
                f"{folder} is no export ({reason}), and nothing else is replaced: move it away, or choose another --name."
            ) from None


def _replace_folder(new: Path, folder: Path) -> None:
    check_replaceable(folder)
    new.chmod(0o755)  # temporary folders are private
    retired = new.with_name(new.name + "-old")
    if folder.exists():
        folder.rename(retired)
    new.rename(folder)
    new.mkdir()  # for the clean-up of the temporary folder
    shutil.rmtree(retired, ignore_errors=True)


def probe_images(size: int) -> Tensor:
    """The fixed inputs of the probe: smooth random colours, uint8 (N, 3, size, size)."""
    coarse = np.random.default_rng(PROBE_SEED).random((PROBE_IMAGES, 3, 4, 4), dtype=np.float32)
    smooth = nn.functional.interpolate(torch.from_numpy(coarse), size=(size, size), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


def model_card(config: dict) -> str:
    """README.md of an export. What others may have written stands in it as text, not as Markdown."""
    training, test, size = config["training"], config["test"], config["size"]
    low, high = test["test_accuracy_interval"]
    side = config["input_size"]
    n = n_views(config["tta_views"])
    tta = f" with test-time augmentation {test['test_accuracy_tta']:.2%}, averaged over {n} views," if n > 1 else ""
    enlarged = f", brought to {side} x {side} on the way" if side != size else ""
    return f"""# {markdown(config["name"])}

An image classifier for {len(config["classes"])} classes: {", ".join(map(markdown, config["classes"]))}.

| | |
|---|---|
| network | {_code(config["model"])}, {training["n_params"]:,} parameters, {size} x {size} pixels{enlarged} |
| weights | {markdown(training.get("weights", "from scratch"))} |
| training data | {markdown(training["data"])} |
| recipe | {_code(training["recipe"])}, {training["epochs_run"]} epochs, seed {training["seed"]} |
| trained on | {markdown(training["hardware"])}, in {training["train_seconds"] / 60:.0f} minutes |
| test accuracy | {test["test_accuracy"]:.2%},{tta} one run |
| 95 % interval of the plain figure | {low:.2%} to {high:.2%} |
| calibration error | {test["ece"]:.3f}; confidences were calibrated on validation images |
| test loss | {test["test_loss"]:.4f} |
| test images called unlike the training images | {test["false_alarm_rate"]:.1%} |
| created | {markdown(config["created"])} |

Use: {_code(f"python predict.py --export {shlex.quote(config['name'])} photo.png")}, or in Python

    from cifar_fastai import load_learner
    label, index, probabilities = load_learner({json.dumps("exports/" + config["name"])}).predict("photo.png")

It always answers with one of its classes, whatever the picture shows, and photographs that differ from its training
images in kind are often misread. It is made for learning and demonstration, not for decisions about people or safety.
"""


def _code(text: str) -> str:
    """As code within a line of Markdown, which knows no escapes for its own mark."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', '/')}`"


# --- reading -----------------------------------------------------------------------------------------------------


def load_export(folder: str | os.PathLike, expect_digest: str | None = None) -> Export:
    """Read and check an export. No code from its files runs: nothing is unpickled, the network comes from the registry.

    Each file is read once and hashed against MANIFEST.json before anything parses it, the weights must fit the named
    network and be finite, and the network must give the probe's probabilities again (to 1e-4). Links and files that are
    not listed are refused. expect_digest: the sha256 that MANIFEST.json must have. Raises ExportError.
    """
    folder = Path(folder)
    if not os.path.isfile(folder / MANIFEST):  # noqa: PTH113  Path.is_file raises over a name that is too long
        raise ExportError(f"There is no export at {folder} (no {MANIFEST}). {HOW_TO_GET_ONE}")
    try:
        sealed = open_sealed(folder, expect_digest)
        files = sealed.read_required()
        config = _parse_config(files[CONFIG])
        export = Export(folder, _build_model(config, files[WEIGHTS]), config, sealed)
        _check_probe(export, files[PROBE])
    except ExportError as error:
        raise ExportError(f"The export {folder} cannot be used: {error}") from None
    return export


def _parse_config(data: bytes) -> dict:
    content = parse_json(CONFIG, data)
    check_schema(CONFIG, content)
    try:
        return checked(ExportConfig, CONFIG, content)
    except UserError as error:
        raise ExportError(str(error)) from None


def _build_model(config: dict, data: bytes) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load

    named = (config["model"], len(config["classes"]), config["size"], config["input_size"])
    try:
        weights = load(data)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ExportError(f"{WEIGHTS} does not fit the model {config['model']!r} ({first_line(error)}).") from None
    check_fits(weights, WEIGHTS, *named)
    model = _create_model(*named)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def check_fits(weights: dict, where: str, name: str, n_classes: int, size: int, input_size: int) -> None:
    """Raises ExportError unless these are the finite weights, by name, of that network. It is not built for that: a small
    file may name a huge one. where: the file, for the error."""
    expected = _create_model(name, n_classes, size, input_size, hollow=True).state_dict()
    if difference := misfit(weights, expected):
        raise ExportError(f"{where} does not fit the model {name!r}: {difference}.")
    for key, value in weights.items():
        if value.dtype != expected[key].dtype:
            raise ExportError(f"the weights {key} in {where} are {value.dtype} where the model has {expected[key].dtype}.")
        if not value.isfinite().all():
            raise ExportError(f"the weights {key} in {where} are not finite.")


def _create_model(name: str, n_classes: int, size: int, input_size: int, hollow: bool = False) -> nn.Module:
    """A network of the registry. hollow: without memory for its weights."""
    if name in MODELS:
        with torch.device("meta" if hollow else "cpu"):
            return create_model(name, n_classes, size)
    from cifar_fastai.pretrained import create_architecture, is_architecture, timm_hint  # imports torchvision

    if not is_architecture(name):
        raise ExportError(f"it names a model {shown(name)} that is not known here{timm_hint()}.")
    try:
        return create_architecture(name, n_classes, input_size, hollow)
    except UserError as error:
        raise ExportError(str(error)) from None
    except Exception as error:  # some of timm's are no classifiers, and raise nearly anything
        raise ExportError(
            f"the model {name!r} cannot be built here ({type(error).__name__}: {first_line(error)})."
        ) from None


def _check_probe(export: Export, data: bytes) -> None:
    try:
        images, probabilities, scores = _read_probe(data, export.size, len(export.classes))
        found = export.scores(images)
        # Where a probability is all but 1, hardly anything changes it, so the scores behind them are compared too.
        off = (found.softmax(dim=1) - probabilities).abs().max(), (found - scores).abs().max() / scores.abs().max()
        difference = max(off).item()
    except Exception as error:  # NumPy and zipfile raise nearly anything on a file that is none
        raise ExportError(f"{PROBE} is damaged ({error}).") from None
    if not difference <= PROBE_LIMIT:
        raise ExportError(f"it computes other probabilities here than where it was made (by up to {difference:.1e}).")
    if difference > PROBE_NOISE:
        words = f"{export.folder}: probabilities differ by up to {difference:.1e} from those where it was made."
        warnings.warn(words, ExportWarning, stacklevel=3)


def _read_probe(data: bytes, size: int, n_classes: int) -> list[Tensor]:
    """The arrays of PROBE_PARTS. Raises nearly anything."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(member.file_size for member in archive.infolist()) > len(data):
            raise ValueError("it would unpack to more than itself")
    with np.load(io.BytesIO(data), allow_pickle=False) as probe:
        arrays = [probe[name] for name in PROBE_PARTS]
    answers = ((PROBE_IMAGES, n_classes), np.float32)
    expected = [((PROBE_IMAGES, 3, size, size), np.uint8), answers, answers]
    if [(array.shape, array.dtype) for array in arrays] != expected:
        raise ValueError("its arrays are of other shapes or types")
    return [torch.from_numpy(array) for array in arrays]


def load_learner(folder: str | os.PathLike, expect_digest: str | None = None):
    """A fastai Learner from an export, safely: see `load_export`. `learn.predict` takes whatever `decode_image` takes.

    Raises ExportError. (fastai's own `load_learner` opens export.pkl, which can run any code: only for your own files.)
    """
    return _learner(load_export(folder, expect_digest))


def load_pickled_learner(path: str | os.PathLike, sha256: str):
    """fastai's Learner from an export.pkl, if these are the very bytes that you know.

    Opening a pickle runs whatever code is in it, so nothing here does so unasked. sha256: of the file, in hexadecimal, as
    the MANIFEST.json beside it says, and from where nobody else writes: whoever can change the file could change a
    manifest too. Raises ExportError, before anything of the file is parsed.
    """
    from fastai.learner import load_learner

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror or error}).") from None
    found = hashlib.sha256(data).hexdigest()
    if not SHA256.fullmatch(sha256.lower()) or found != sha256.lower():
        raise ExportError(f"{path} has the sha256 {found}, not the expected one, and was not opened.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "load_learner` uses Python's insecure pickle module")
        return load_learner(io.BytesIO(data))


def _learner(export: Export):
    """A quiet fastai Learner around an export's network, ready to predict."""
    from fastai.callback.progress import ProgressCallback
    from fastai.learner import Learner
    from fastai.metrics import accuracy

    from cifar_fastai.data import inference_dataloaders
    from cifar_fastai.learner import CalibratedLoss

    dls = inference_dataloaders(export.classes, export.size, export.config["mean"], export.config["std"])
    learn = Learner(dls, export.model, loss_func=CalibratedLoss(export.config["temperature"]), metrics=accuracy)
    learn.remove_cbs(ProgressCallback)  # it would print a bar at every prediction
    return learn


def find_export(path: str | os.PathLike | None) -> Path:
    """The export that `path` names (a folder, or a name in exports/); the newest in exports/ if None.

    exports/ is looked for in the working folder, then beside the package. Raises ExportError.
    """
    shelves = [Path("exports"), Path(__file__).parent.parent / "exports"]
    if path is not None:
        candidates = [Path(path), *(shelf / path for shelf in shelves)]
        found = (folder for folder in candidates if os.path.isfile(folder / MANIFEST))  # noqa: PTH113  as in load_export
        return next(found, Path(path))
    for shelf in shelves:
        if exports := sorted(shelf.glob(f"[!.]*/{MANIFEST}"), key=_created):
            return exports[-1].parent
    raise ExportError(f"There is no export in exports/ yet. {HOW_TO_GET_ONE}")


def _created(manifest: Path) -> str:
    try:
        return _parse_config(open_sealed(manifest.parent).read(CONFIG))["created"]
    except ExportError:
        return ""  # damaged: last choice, and loading it will say so
