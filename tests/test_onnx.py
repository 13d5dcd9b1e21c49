"""model.onnx: the same answers without torch."""

import hashlib
import io
import json
import re
import shutil
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.commands import ROOT, call
from PIL import ExifTags, Image
from safetensors.torch import save

from cifar_fastai import Classifier, onnx_export
from cifar_fastai.artifacts import Export, load_export, probe_images
from cifar_fastai.cli import main
from cifar_fastai.errors import ExportError
from cifar_fastai.manifest import write_manifest
from cifar_fastai.models import MODELS, create_model
from cifar_fastai.onnx_export import check_images, write_onnx


@pytest.fixture
def export(digits_run, tmp_path):
    """A copy of the digits export that may be changed."""
    return shutil.copytree(digits_run.export, tmp_path / "export")


@pytest.fixture(scope="module")
def onnx_file(digits_run, tmp_path_factory):
    """The ONNX file of the digits export."""
    folder = shutil.copytree(digits_run.export, tmp_path_factory.mktemp("onnx") / "export")
    return write_onnx(folder)[0]


def answers_of(path, images: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(None, {"images": images})[0]


def answers_of_classifier(folder, images: np.ndarray) -> np.ndarray:
    classifier = Classifier(folder)
    answers = classifier.predict_batch(images.transpose(0, 2, 3, 1))
    return np.array([[answer[name] for name in classifier.classes] for answer in answers])


def change_network(folder, model: str, size: int) -> None:
    """Put another network into an export, at random but sure of itself: with scores that differ from class to class."""
    torch.manual_seed(0)
    network = create_model(model, 10, size).eval()
    config = json.loads((folder / "config.json").read_text())
    config |= {"model": model, "size": size, "input_size": size, "temperature": 1.0}
    scores = Export(folder, network, config).scores(check_images(size)[::20])
    config["temperature"] = scores.std(dim=1).mean().item() / 2
    probe = probe_images(size)
    scores = Export(folder, network, config).scores(probe)
    file = io.BytesIO()
    np.savez(file, images=probe, probabilities=scores.softmax(dim=1), scores=scores)
    (folder / "probe.npz").write_bytes(file.getvalue())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(save({n: value.contiguous() for n, value in network.state_dict().items()}))
    write_manifest(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "size"), [*((model, 32) for model in MODELS), *((model, 64) for model in ("small", "base", "slim"))]
)
def test_every_model_answers_as_the_classifier_does(export, model, size):
    change_network(export, model, size)
    path, difference, _ = write_onnx(export)
    assert path == export / "model.onnx" and difference <= 1e-5
    random = np.random.default_rng(5)
    coarse = random.integers(0, 256, (7, 3, 4, 4), dtype=np.uint8)
    images = coarse.repeat(size // 4, axis=2).repeat(size // 4, axis=3)
    for n in (7, 1):
        assert np.abs(answers_of(path, images[:n]) - answers_of_classifier(export, images[:n])).max() <= 1e-5
    assert answers_of(path, images).max(axis=1).std() > 0.001, "answers that differ"


def test_a_thousand_real_images(onnx_file, digits_run):
    from cifar_fastai.cache import load_data

    data = load_data("digits")
    images = data.images[-1000:].transpose(0, 3, 1, 2)
    found, expected = answers_of(onnx_file, images), answers_of_classifier(digits_run.export, images)
    assert np.abs(found - expected).max() <= 1e-5 and found.dtype == np.float32
    assert found.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert (found.argmax(axis=1) == data.labels[-1000:]).mean() > 0.9


def test_the_file_says_what_it_is(onnx_file, digits_run):
    session = onnxruntime.InferenceSession(onnx_file)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list("0123456789") and about["size"] == "32" and about["name"] == "digits"
    for name, key in (("model.safetensors", "weights_sha256"), ("config.json", "config_sha256")):
        assert about[key] == hashlib.sha256((digits_run.export / name).read_bytes()).hexdigest()
    (images,), (probabilities,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape[1:]) == ("images", "tensor(uint8)", [3, 32, 32])
    assert (probabilities.name, probabilities.type, probabilities.shape[1:]) == ("probabilities", "tensor(float)", [10])
    assert isinstance(images.shape[0], str) and images.shape[0] == probabilities.shape[0], "any number of images"


def test_the_command_adds_it_to_an_export(export, capsys):
    before = json.loads((export / "MANIFEST.json").read_text())["files"]
    for _ in range(2):  # a second time replaces it
        assert main("export", [str(export), "--onnx"]) == 0
        digest = hashlib.sha256((export / "MANIFEST.json").read_bytes()).hexdigest()
        words = rf"onnx .*model\.onnx: 1,000 images checked.*\de-\d\d\ndigest   {digest}: .*\n"
        assert re.fullmatch(words, capsys.readouterr().out)
        files = json.loads((export / "MANIFEST.json").read_text())["files"]
        data = (export / "model.onnx").read_bytes()
        assert files.pop("model.onnx") == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        assert files == before
        assert {path.name for path in export.iterdir()} == {*before, "model.onnx", "MANIFEST.json"}
        load_export(export, digest)


def test_what_was_damaged_does_not_become_valid(export, capsys):
    (export / "export.pkl").write_bytes(b"damaged")
    before = (export / "MANIFEST.json").read_bytes()
    assert main("export", [str(export), "--onnx"]) == 5
    assert "export.pkl is not the file" in capsys.readouterr().err
    assert (export / "MANIFEST.json").read_bytes() == before and not (export / "model.onnx").exists()


def test_a_run_becomes_an_export_with_it(digits_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("export", [str(digits_run.folder), "--onnx", "--name", "again"]) == 0
    listed = json.loads((tmp_path / "exports" / "again" / "MANIFEST.json").read_text())["files"]
    assert "model.onnx" in listed and "onnx     exports/again/model.onnx" in capsys.readouterr().out
    load_export(tmp_path / "exports" / "again")


def test_a_file_that_answers_otherwise_is_not_left(export, monkeypatch):
    """Without the temperature, say."""
    manifest = (export / "MANIFEST.json").read_text()

    def forward(self, images):
        config = self.export.config
        return self.network(onnx_export.normalize(images, config["mean"], config["std"])).softmax(dim=1)

    monkeypatch.setattr(onnx_export._Answering, "forward", forward)
    with pytest.raises(ExportError, match=r"gives other probabilities, by up to .*; nothing was written"):
        write_onnx(export)
    assert not (export / "model.onnx").exists() and (export / "MANIFEST.json").read_text() == manifest


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_missing_packages_are_named_before_anything_is_written(digits_run, tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails as if it were not installed
    monkeypatch.chdir(tmp_path)
    assert main("export", [str(digits_run.folder), "--onnx"]) == 2
    line = f"error: ONNX needs the package {package!r}: `pip install onnxruntime onnxscript`.\n"
    assert capsys.readouterr() == ("", line) and not (tmp_path / "exports").exists()


def test_wrong_usage(export, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("export", [str(export), "--onnx", "--name", "x"]) == 2
    assert "takes neither --name nor --data" in capsys.readouterr().err
    assert main("export", ["nowhere", "--onnx"]) == 5
    assert "There is no export at nowhere" in capsys.readouterr().err
    (export / "model.safetensors").write_bytes(b"")
    assert main("export", [str(export), "--onnx"]) == 5
    assert "damaged or changed" in capsys.readouterr().err and not (export / "model.onnx").exists()


@pytest.mark.parametrize("size", [(90, 90), (140, 60), (50, 200)])
def test_the_readmes_example_gives_the_classifiers_answer_without_torch(onnx_file, digits_run, tmp_path, size):
    (code,) = re.findall(
        r"\n\n((?:    .*\n|\n)*    import .*onnxruntime.*\n(?:    .*\n|\n)*)", (ROOT / "README.md").read_text()
    )
    code = "\n".join(line[4:] for line in code.splitlines())
    (tmp_path / "exports" / "cifar10").mkdir(parents=True)
    shutil.copy(onnx_file, tmp_path / "exports" / "cifar10")
    pixels = np.random.default_rng(8).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", quality=95, exif=turned)
    code += "\nimport sys; assert not {'torch', 'cifar_fastai'} & set(sys.modules)"
    done = call("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    label, confidence = next(iter(Classifier(digits_run.export).predict(tmp_path / "photo.jpg").items()))
    assert done.stdout == f"{label} {confidence:.1%}\n"
