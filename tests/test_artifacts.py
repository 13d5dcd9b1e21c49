import hashlib
import json
import pickle
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fastai.learner
import numpy as np
import pytest
import torch
from helpers.commands import ROOT, call, call_here
from helpers.files import Canary
from PIL import Image
from safetensors.numpy import load_file

from cifar_fastai import (
    Classifier,
    create_learner,
    dataloaders,
    fit,
    get_recipe,
    load_learner,
    load_pickled_learner,
    manifest,
)
from cifar_fastai.artifacts import check_target, find_export, load_export, normalize, probe_images, write_export
from cifar_fastai.errors import ExportError, ExportWarning, UserError
from cifar_fastai.learner import CalibratedLoss
from cifar_fastai.manifest import SCHEMA, write_manifest
from cifar_fastai.pretrained import create_architecture
from cifar_fastai.recipes import RECIPES
from cifar_fastai.runfolder import NO_ROOM


@pytest.fixture
def export(digits_run, tmp_path):
    """A copy of the digits export that may be damaged."""
    return shutil.copytree(digits_run.export, tmp_path / "export")


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_manifest_lists_every_file_with_its_hash(export):
    files = json.loads((export / "MANIFEST.json").read_text())["files"]
    present = {path.name for path in export.iterdir()} - {"MANIFEST.json"}
    assert set(files) == present == {"model.safetensors", "config.json", "probe.npz", "export.pkl", "README.md"}
    for name, entry in files.items():
        data = (export / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def test_three_roads_to_the_same_probabilities_in_a_fresh_process(export, photo, tmp_path):
    """The safe learner, fastai's pickle and the Classifier, each alone in a new process, and all of them here."""
    roads = {
        "safe": f"from cifar_fastai import load_learner; p = load_learner({str(export)!r}).predict({str(photo)!r})[2]",
        "pickle": f"from fastai.learner import load_learner; p = load_learner({str(export / 'export.pkl')!r})"
        f".predict({str(photo)!r})[2]",
        "classifier": f"from cifar_fastai import Classifier; c = Classifier({str(export)!r}); a = c.predict({str(photo)!r})"
        "; import torch; p = torch.tensor([a[name] for name in c.classes])",
    }
    answers = {}
    for name, code in roads.items():
        done = call("-W", "ignore", "-c", f"{code}; print([float(x).hex() for x in p])", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1, "prediction prints nothing of its own"
        answers[name] = done.stdout
    here = [float(x).hex() for x in load_learner(export).predict(photo)[2]]
    assert answers["safe"].strip() == str(here)
    assert answers["safe"] == answers["pickle"] == answers["classifier"]


def test_the_pickle_holds_hardly_more_than_the_weights(export):
    """A megabyte more is allowed; nothing in it may grow with the data or with the length of the training."""
    weights = sum(array.nbytes for array in load_file(export / "model.safetensors").values())
    assert (export / "export.pkl").stat().st_size <= weights + 100_000
    learn = fastai.learner.load_learner(export / "export.pkl")
    assert sum(map(len, learn.dls.valid_ds.splits)) <= 2 and not getattr(learn.recorder, "lrs", [])


def test_what_was_hashed_is_what_is_parsed(export, monkeypatch):
    """Each file is gone as soon as it was read: there is no second read between which and the first it could change."""
    first_read = manifest._read

    def read_and_remove(path, limit):
        data = first_read(path, limit)
        path.unlink()
        return data

    monkeypatch.setattr(manifest, "_read", read_and_remove)
    load_export(export)
    assert not list(export.iterdir())


def test_an_expected_digest(export, monkeypatch):
    digest = hashlib.sha256((export / "MANIFEST.json").read_bytes()).hexdigest()
    assert load_export(export, digest.upper()).sealed.digest == digest
    Classifier(export, expect_digest=digest)
    load_learner(export, expect_digest=digest)
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        load_learner(export, expect_digest=digest[:-1])
    rewrite(export, "config.json", '"digits"', '"digitz"')  # and the manifest fits again
    load_export(export)
    for load in (load_learner, Classifier):
        with pytest.raises(ExportError, match="not the expected one"):
            load(export, expect_digest=digest)


def test_a_pickle_is_opened_by_its_sha256_alone(export, photo, tmp_path):
    path, canary = export / "export.pkl", tmp_path / "canary"
    known = json.loads((export / "MANIFEST.json").read_text())["files"]["export.pkl"]["sha256"]
    assert torch.equal(load_pickled_learner(path, known).predict(photo)[2], load_learner(export).predict(photo)[2])
    path.write_bytes(pickle.dumps(Canary(canary)))
    for sha256 in (known, "", "0" * 64):
        with pytest.raises(ExportError, match="was not opened"):
            load_pickled_learner(path, sha256)
    with pytest.raises(ExportError, match="cannot be read"):
        load_pickled_learner(tmp_path, known)
    assert not canary.exists()
    with pytest.raises(RuntimeError):  # it is no learner, which is found out too late: why nothing else opens such files
        load_pickled_learner(path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert canary.exists()


def test_loading_needs_no_pickle_and_no_model_card(export, photo):
    (export / "export.pkl").unlink()
    (export / "README.md").unlink()
    assert load_learner(export).predict(photo)[0] in load_export(export).classes


def test_a_loaded_learner_can_be_trained_further(trained):
    """It is a whole Learner: give it data and it validates, as fastai's users do."""
    from cifar_fastai import dataloaders, get_recipe

    dls = dataloaders("digits", get_recipe("classic-adam"))
    assert trained.validate(dl=dls.valid)[1] > 0.9


def test_normalisation_travels_with_the_weights(export, trained):
    config, x = load_export(export).config, probe_images(32)
    from fastai.vision.core import TensorImage

    (through_fastai,) = trained.dls.valid.after_batch((TensorImage(x),))
    ours = normalize(x, config["mean"], config["std"])
    assert torch.equal(through_fastai.as_subclass(torch.Tensor), ours)


def test_the_model_card_says_what_it_is(export):
    card, config = (export / "README.md").read_text(), json.loads((export / "config.json").read_text())
    assert f"{config['test']['test_accuracy']:.2%}" in card and "digits" in card and "classic-sgd" in card


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_exports_what_it_trained(name, tmp_path, photo):
    freeze_early = min(1, RECIPES[name].whiten_bias_epochs)  # so that the stem's bias is frozen on the way
    fields = {"epochs": 2, "bs": 64, "whiten_bias_epochs": freeze_early, "pretrained": False, "input_size": 32}
    recipe = get_recipe(name, **fields)
    learn = create_learner(dataloaders("digits", recipe, subset=150), recipe, seed=1)
    training = {"recipe": name, "data": "digits", "n_params": 1, "epochs_run": 1, "seed": 1, "hardware": "here"}
    facts = {
        "training": {**training, "train_seconds": 1},
        "test": {
            "test_accuracy": 0.1,
            "test_accuracy_interval": [0, 1],
            "test_accuracy_tta": 0.1,
            "test_loss": 2,
            "ece": 0.1,
            "false_alarm_rate": 0.05,
            "per_class": {str(digit): {"recall": 1, "precision": 1.0, "support": 9} for digit in range(10)},
            "confusion_matrix": [[9] * 10] * 10,
            "risk_coverage": [{"threshold": 0, "coverage": 1, "accuracy": None}],
        },
        "temperature": 1.5,
        "unfamiliar_below": 2.5,
        "versions": {"python": "3"},
    }
    with learn.no_bar():
        fit(learn, recipe)
        write_export(tmp_path / "x", learn, name="x", created="2030", model=recipe.model, **facts)
        learn.loss_func = CalibratedLoss(1.5)
        expected = learn.predict(photo)[2]
    safe = load_learner(tmp_path / "x")
    with pytest.warns(UserWarning, match="insecure pickle"):
        pickled = fastai.learner.load_learner(tmp_path / "x" / "export.pkl")
    assert torch.equal(safe.predict(photo)[2], expected) and torch.equal(pickled.predict(photo)[2], expected)
    answer = Classifier(tmp_path / "x").predict(photo)
    assert [answer[label] for label in safe.dls.vocab] == expected.tolist()


@pytest.mark.parametrize("missing", ["model.safetensors", "export.pkl"])
def test_an_export_without_room(export, missing):
    """The limit on the size of a file is met as a full disk is. What was there before stays."""
    config, learn = json.loads((export / "config.json").read_text()), load_learner(export)
    learn.dls.data = SimpleNamespace(size=config["size"])
    fields = ("temperature", "unfamiliar_below", "training", "test", "versions", "model", "created", "name")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((export / missing).stat().st_size - 1000, before[1]))
    try:
        with pytest.raises(OSError, match=export.name) as caught:
            write_export(export, learn, **{name: config[name] for name in fields})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(export) and caught.value.errno in NO_ROOM
    assert load_export(export).config == config and [*export.parent.iterdir()] == [export]


def test_views_of_test_time_augmentation(export):
    assert load_export(export).config["tta_views"] == ["mirror", "shift"]
    edit_config(export, tta_views=["shift"])
    assert load_export(export).config["tta_views"] == ["shift"]
    for wrong in (["shift", "shift"], ["rotate"], [["shift"]], "shift", None):
        edit_config(export, tta_views=wrong)
        with pytest.raises(ExportError, match="tta_views"):
            load_export(export)


def test_an_export_of_schema_3_has_all_views(export):
    config = json.loads((export / "config.json").read_text())
    del config["tta_views"]
    (export / "config.json").write_text(json.dumps(config))
    write_manifest(export)
    with pytest.raises(ExportError, match="tta_views"):
        load_export(export)
    edit_config(export, schema=3)
    assert load_export(export).config["tta_views"] == ["mirror", "shift"]
    assert load_export(ROOT / "exports" / "cifar10").config["schema"] == 3


# --- what must be refused ----------------------------------------------------------------------------------------


def edit_config(export, **changes):
    config = json.loads((export / "config.json").read_text()) | changes
    (export / "config.json").write_text(json.dumps(config))
    write_manifest(export)


def rewrite(export, name, old, new):
    """Replace text in a JSON file, and list the file as it is then."""
    text = (export / name).read_text()
    assert old in text
    (export / name).write_text(text.replace(old, new, 1))
    if name != "MANIFEST.json":
        write_manifest(export)


def edit_test(export, **changes):
    edit_config(export, test=json.loads((export / "config.json").read_text())["test"] | changes)


def change_probe(export, save=np.savez, **changes):
    with np.load(export / "probe.npz") as probe:
        save(export / "probe.npz", **{**probe, **changes})
    write_manifest(export)


def link(export, name):
    (export / name).rename(export.parent / name)
    (export / name).symlink_to(export.parent / name)


def change_weights(export, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(export / "model.safetensors")
    change(weights)
    save_file(weights, export / "model.safetensors")
    write_manifest(export)


DAMAGE = {
    "weights missing": (lambda e: (e / "model.safetensors").unlink(), "model.safetensors cannot be read"),
    "weights empty": (lambda e: (e / "model.safetensors").write_bytes(b""), "damaged or changed"),
    "a page in place of weights": (lambda e: (e / "model.safetensors").write_text("<html>"), "damaged or changed"),
    "manifest missing": (lambda e: (e / "MANIFEST.json").unlink(), "There is no export at"),
    "manifest empty": (lambda e: (e / "MANIFEST.json").write_text(""), "MANIFEST.json is damaged"),
    "manifest a list": (lambda e: (e / "MANIFEST.json").write_text("[]"), "MANIFEST.json is damaged"),
    "config no object": (lambda e: ((e / "config.json").write_text("[]"), write_manifest(e)), "config.json is damaged"),
    "schema of tomorrow": (lambda e: edit_config(e, schema=SCHEMA + 1), f"schema {SCHEMA + 1}"),
    "model unknown": (lambda e: edit_config(e, model="os.system"), "not known here"),
    "model of another kind": (lambda e: edit_config(e, model="base"), "does not fit"),
    "fewer classes": (lambda e: edit_config(e, classes=["a", "b"]), "per_class must have a row for each class"),
    "a class twice": (lambda e: edit_config(e, classes=["a"] * 10), "classes must be 2 to 1,500 different names"),
    "huge images": (lambda e: edit_config(e, size=10**9), "size must be a whole number from 16 to 128"),
    "std zero": (lambda e: edit_config(e, std=[0, 1, 1]), "std must be three numbers above 0"),
    "mean a word": (lambda e: edit_config(e, mean=["x", 0, 0]), "mean must be three numbers"),
    "temperature zero": (lambda e: edit_config(e, temperature=0.0), "temperature must be a number above 0, not 0.0"),
    "temperature infinite": (lambda e: edit_config(e, temperature=float("inf")), "Infinity is no JSON"),
    "threshold no number": (lambda e: edit_config(e, unfamiliar_below=float("nan")), "NaN is no JSON"),
    "a number out of range": (lambda e: rewrite(e, "config.json", '"size": 32', '"size": 1e999'), "number out of range"),
    "a longer number": (lambda e: rewrite(e, "config.json", '"size": 32', '"size": 1' + "0" * 5000), "number out of range"),
    "a key twice": (lambda e: rewrite(e, "config.json", '"size": 32', '"size": 32, "size": 32'), "stands there twice"),
    "half a character": (lambda e: rewrite(e, "config.json", '"digits"', '"\\ud800"'), "surrogates not allowed"),
    "lists without end": (lambda e: rewrite(e, "config.json", '"size": 32', '"size": ' + "[" * 10**5), "recursion"),
    "not in UTF-8": (lambda e: ((e / "config.json").write_bytes(b'"\xff"'), write_manifest(e)), "config.json is damaged"),
    "a field too many": (lambda e: edit_config(e, code="import os"), "code is no field that this version knows"),
    "a truth for a number": (lambda e: edit_config(e, size=True), "size must be a whole number from 16 to 128, not True"),
    "no figures": (lambda e: edit_config(e, test={}), "test.test_accuracy is missing"),
    "a figure in words": (lambda e: edit_test(e, ece="small"), "test.ece must be a share from 0 to 1, not 'small'"),
    "a class without figures": (lambda e: edit_test(e, per_class={}), "per_class must have a row for each class"),
    "figures of a class in words": (
        lambda e: edit_test(e, per_class={str(digit): {"recall": "<b>"} for digit in range(10)}),
        "test.per_class.0.recall must be a share from 0 to 1, not '<b>'",
    ),
    "a matrix of words": (
        lambda e: edit_test(e, confusion_matrix=[["<b>"] * 10] * 10),
        "test.confusion_matrix must be a table",
    ),
    "a matrix with a row too few": (
        lambda e: edit_test(e, confusion_matrix=[[1] * 10] * 9),
        "confusion_matrix must have a row",
    ),
    "a row that is none": (lambda e: edit_test(e, risk_coverage=[1]), "test.risk_coverage.0 must hold fields, not 1"),
    "a diagram of words": (
        lambda e: edit_test(e, reliability=[{"count": 1, "confidence": "<b>", "accuracy": 1}]),
        "test.reliability.0.confidence must be a share",
    ),
    "an interval of one": (lambda e: edit_test(e, test_accuracy_interval=[1]), "interval must be two shares"),
    "a diagram of no images": (
        lambda e: edit_test(e, reliability=[{"count": 0, "confidence": 0.5, "accuracy": 1}] * 3),
        "test.reliability.0.count must be a whole number from 1",
    ),
    "a class that rules a terminal": (
        lambda e: edit_config(e, classes=["\x1b[2J", *"123456789"]),
        "classes must be 2 to 1,500",
    ),
    "a million classes": (lambda e: edit_config(e, classes=list(map(str, range(10**6)))), "classes must be 2 to 1,500"),
    "manifest with a key twice": (lambda e: rewrite(e, "MANIFEST.json", '"schema"', '"schema": 4, "schema"'), "twice"),
    "manifest with a path": (lambda e: rewrite(e, "MANIFEST.json", '"README.md"', '"../README.md"'), "no file of an export"),
    "no weights listed": (
        lambda e: rewrite(e, "MANIFEST.json", '"model.safetensors"', '"model.onnx"'),
        "not list model",
    ),
    "manifest with another size": (
        lambda e: rewrite(e, "MANIFEST.json", '"size": ', '"size": 1'),
        "damaged or changed",
    ),
    "manifest of a huge file": (
        lambda e: rewrite(e, "MANIFEST.json", '"size": ', f'"size": 1{"0" * 12}'),
        "sha256 or size",
    ),
    "manifest with more to say": (lambda e: rewrite(e, "MANIFEST.json", "{", '{"more": 1,'), "other things than a list"),
    "manifest too long": (lambda e: (e / "MANIFEST.json").write_bytes(b" " * 10**6), "far too long"),
    "a file that is not listed": (lambda e: (e / "notes.txt").touch(), "'notes.txt' is not listed"),
    "a hidden file": (lambda e: (e / ".hidden").touch(), "'.hidden' is not listed"),
    "a folder": (lambda e: (e / "more").mkdir(), "'more' is a link or a folder"),
    "links in place of files": (lambda e: link(e, "model.safetensors"), "'model.safetensors' is a link"),
    "a link in place of the manifest": (lambda e: link(e, "MANIFEST.json"), "'MANIFEST.json' is a link"),
    "the model card changed": (lambda e: (e / "README.md").write_text("buy"), "README.md is not the file"),
    "the pickle changed": (lambda e: (e / "export.pkl").write_text("buy"), "export.pkl is not the file"),
    "weights of another type": (
        lambda e: change_weights(e, lambda w: w.update({"head.5.bias": w["head.5.bias"].double()})),
        "float64 where the model has torch.float32",
    ),
    "probe that unpacks to more": (
        lambda e: change_probe(e, np.savez_compressed, images=np.zeros((9, 9, 99, 999), np.uint8)),
        "unpack to more than itself",
    ),
    "probe of other images": (lambda e: change_probe(e, images=np.zeros((0, 3, 32, 32), np.uint8)), "other shapes"),
    "probe of objects": (lambda e: change_probe(e, scores=np.array([None])), "allow_pickle=False"),
    "other temperature": (lambda e: edit_config(e, temperature=0.5), "other probabilities"),
    "other normalisation": (lambda e: edit_config(e, mean=[0.9, 0.9, 0.9]), "other probabilities"),
    "NaN weight": (
        lambda e: change_weights(e, lambda w: w["head.5.bias"][0].fill_(float("nan"))),
        "not finite",
    ),
    "other weight": (lambda e: change_weights(e, lambda w: w["head.5.weight"].mul_(1.5)), "other probabilities"),
    "weight missing": (lambda e: change_weights(e, lambda w: w.pop("head.5.bias")), "does not fit"),
    "probe no archive": (lambda e: ((e / "probe.npz").write_bytes(b"PK"), write_manifest(e)), "probe.npz is damaged"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_refused_with_its_reason(export, how):
    damage, words = DAMAGE[how]
    damage(export)
    with pytest.raises(ExportError, match=words) as caught:
        load_learner(export)
    assert caught.value.exit_code == 5 and str(caught.value).count("\n") == 0


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "probe.npz"])
def test_any_flipped_bit_is_noticed(export, name):
    whole = (export / name).read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 25):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(place) % 8
        (export / name).write_bytes(flipped)
        with pytest.raises(ExportError, match="damaged or changed"):
            load_export(export)
    (export / name).write_bytes(whole)
    load_export(export)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "probe.npz", "export.pkl", "MANIFEST.json"])
def test_a_hostile_pickle_never_runs(export, tmp_path, name):
    canary = tmp_path / "canary"
    (export / name).write_bytes(pickle.dumps(Canary(canary)))
    if name != "MANIFEST.json":
        write_manifest(export)
    try:
        load_learner(export)
        assert name == "export.pkl"  # not read at all
    except ExportError:
        assert name != "export.pkl"
    assert not canary.exists()


def test_small_differences_warn(export):
    change_weights(export, lambda weights: weights["head.5.weight"].mul_(1.00005))
    with pytest.warns(ExportWarning, match="differ by up to"):
        load_export(export)


# --- small files that name large networks --------------------------------------------------------------------------


def peak_of(function) -> float:
    """By how many MB the memory in use was at its highest above what it is before."""

    def kilobytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = kilobytes("VmRSS")
    function()
    return (kilobytes("VmHWM") - before) / 1000


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("model", "size", "input_size", "words"),
    [
        ("vit_h_14", 32, 224, "model.safetensors does not fit the model 'vit_h_14'"),
        ("regnet_y_128gf", 32, 64, "model.safetensors does not fit the model 'regnet_y_128gf'"),
        ("vgg19_bn", 32, 512, "model.safetensors does not fit the model 'vgg19_bn'"),
        ("large", 128, 128, "model.safetensors does not fit the model 'large'"),
        ("small", 1024, 1024, "size must be a whole number from 16 to 128, not 1024"),
        ("resnet18", 128, 1024, "input_size must be a whole number from 16 to 512, not 1024"),
        ("resnet18", 64, 32, "input_size must be no smaller than size"),
    ],
)
def test_a_small_export_that_names_a_large_network_costs_little(export, model, size, input_size, words):
    from cifar_fastai.pretrained import architectures

    architectures()  # imported before anything is measured
    edit_config(export, model=model, size=size, input_size=input_size)
    before = time.process_time()

    def load():
        with pytest.raises(ExportError, match=words):
            load_export(export)

    assert peak_of(load) < 300 and time.process_time() - before < 5


def test_a_model_that_cannot_be_built(export):
    timm = pytest.importorskip("timm")
    for name in ("lambda_resnet50ts", "qwen3_vit_88m_enc", "convnext_xxlarge"):
        if timm.is_model(name):
            edit_config(export, model=name, input_size=64)
            with pytest.raises(ExportError, match=f"{name}' cannot be built here|does not fit the model '{name}'"):
                load_export(export)


def test_a_hollow_network_has_the_weights_of_a_real_one():
    for name in ("resnet18", "regnet_x_400mf", "vit_b_32", "swin_t", "mobilenet_v3_small"):
        side = 224 if name == "vit_b_32" else 64
        hollow, real = (create_architecture(name, 7, side, hollow=hollow) for hollow in (True, False))
        shapes = [{key: (value.shape, value.dtype) for key, value in each.state_dict().items()} for each in (hollow, real)]
        assert shapes[0] == shapes[1] and hollow.maps_name == real.maps_name
        assert all(value.is_meta for value in hollow.state_dict().values())


# --- finding -----------------------------------------------------------------------------------------------------


def test_the_newest_export_is_the_default(export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, created in (("a", "2030-01-02T00:00:00Z"), ("b", "2030-01-01T00:00:00Z")):
        edit_config(shutil.copytree(export, tmp_path / "exports" / name), created=created)
    assert find_export(None).name == "a"
    assert find_export("b").resolve() == tmp_path / "exports" / "b"
    with pytest.raises(ExportError, match="There is no export at nowhere"):
        Classifier(find_export("nowhere"))


def test_an_export_replaces_the_older_one_whole(digits_run, tmp_path):
    cwd = tmp_path / "again"
    shutil.copytree(digits_run.export, cwd / "exports" / "x")
    (cwd / "exports" / "x" / "model.onnx").write_text("stale")
    write_manifest(cwd / "exports" / "x")
    command = ("--data", "digits", "--recipe", "classic-sgd", "--subset", "200", "--epochs", "1")
    done = call_here("train", *command, "--name", "x", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert not (cwd / "exports" / "x" / "model.onnx").exists()
    assert [path.name for path in (cwd / "exports").iterdir()] == ["x"], "nothing half-made is left"
    load_export(cwd / "exports" / "x")


OTHERS = {  # what may be where an export is to go
    "documents": lambda place, _: (
        (place / "letters").mkdir(parents=True),
        (place / "letters" / "a.txt").write_text("dear"),
    ),
    "an empty folder": lambda place, _: place.mkdir(),
    "a file": lambda place, _: place.write_text("dear"),
    "a link to an export": lambda place, export: place.symlink_to(export),
    "a link to nothing": lambda place, _: place.symlink_to("nowhere"),
    "an export and more": lambda place, export: (shutil.copytree(export, place), (place / "notes.txt").touch()),
    "an export and a folder": lambda place, export: (shutil.copytree(export, place), (place / "more").mkdir()),
    "an export with a link": lambda place, export: (
        shutil.copytree(export, place),
        (place / "README.md").unlink(),
        (place / "README.md").symlink_to("/etc/hostname"),
    ),
    "a manifest of other things": lambda place, _: (
        place.mkdir(),
        (place / "MANIFEST.json").write_text('{"files": {}}'),
    ),
}


def listing(folder):
    """All that is in a folder: of links where they lead, of files the content."""
    return {
        path: path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("other", OTHERS)
def test_nothing_but_an_export_is_replaced(digits_run, export, tmp_path, other):
    """By none of the ways to an export, and a training is refused before it begins."""
    cwd = tmp_path / "here"
    (cwd / "exports").mkdir(parents=True)
    OTHERS[other](cwd / "exports" / "digits", export)
    shutil.copytree(digits_run.folder, cwd / "cut")
    (cwd / "cut" / "metrics.json").unlink()
    before = listing(cwd / "exports")
    commands = (
        ("export", digits_run.folder),
        ("train", "--resume", "cut"),
        ("train", "--data", "digits", "--name", "digits"),
    )
    for command in commands:
        done = call_here(*command, cwd=cwd)
        assert done.returncode == 2 and "exports/digits is no export (" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and listing(cwd / "exports") == before
    assert not (cwd / "runs").exists()
    learn = load_learner(export)
    learn.dls.data = SimpleNamespace(size=32)
    config = load_export(export).config
    fields = ("temperature", "unfamiliar_below", "training", "test", "versions", "model", "created", "name")
    with pytest.raises(UserError, match="is no export"):
        write_export(cwd / "exports" / "digits", learn, **{name: config[name] for name in fields})
    assert listing(cwd / "exports") == before


def test_where_an_export_can_go(export, tmp_path):
    exports = tmp_path / "exports"
    assert check_target(exports, "new") == exports / "new" and not exports.exists()
    shutil.copytree(export, exports / "old")
    (exports / "old" / "README.md").write_text("damaged, but an export")
    assert check_target(exports, "old") == exports / "old" and [path.name for path in exports.iterdir()] == ["old"]
    for name in ("", ".", "..", "../x", "/etc", str(tmp_path), "a/b", "a\n", "a" * 101, ".hidden", "a b", "a\0"):
        with pytest.raises(UserError, match="An export cannot be called"):
            check_target(exports, name)
    with pytest.raises(UserError, match=r"There is no room for the export .*: it takes about 1,000,000,000,000 MB"):
        check_target(exports, "new", n_bytes=10**18)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/new could not be written: Not a directory"):
        check_target(tmp_path / "file", "new")


def test_a_training_is_refused_where_its_export_could_not_be_written(tmp_path):
    (tmp_path / "exports").touch()
    for more in ((), ("--name", "x"), ("--seeds", "2")):
        done = call_here("train", "--data", "digits", "--recipe", "classic-sgd", *more, cwd=tmp_path)
        assert done.returncode == 2 and "could not be written: Not a directory" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_exports_are_readable_by_others(digits_run):
    mode = subprocess.run(["stat", "-c", "%a", digits_run.export], capture_output=True, text=True, check=True)
    assert mode.stdout.strip() == "755"
