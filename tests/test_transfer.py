"""Networks that others have trained. Their published weights need a network, so random ones in files stand for them."""

import json
import math
import os
import pickle
import shutil
import socket
import urllib.request

import cifar_fastai.compat  # noqa: F401  before torchvision

# isort: split
import numpy as np
import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.torch_core import norm_types
from fastai.vision.learner import create_vision_model
from helpers.commands import assert_clear_error, call, environment
from helpers.trainings import assert_same_training, train_in_legs
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model, resnet18

from cifar_fastai import Classifier, create_learner, dataloaders, fit, get_recipe, load_learner, pretrained, resuming
from cifar_fastai.artifacts import load_export, write_manifest
from cifar_fastai.cache import load_data
from cifar_fastai.cli import main
from cifar_fastai.errors import DataError, ExportError, UserError
from cifar_fastai.finished import evaluate_run, reexport_run
from cifar_fastai.lrfinder import search_lr, without_epochs
from cifar_fastai.metrics import unfamiliar_below
from cifar_fastai.onnx_export import write_onnx
from cifar_fastai.pretrained import (
    channel_stats,
    check_model,
    create_architecture,
    create_pretrained,
    try_model,
    weights_origin,
)
from cifar_fastai.run import RunOptions, resume, run

NAME = "mobilenet_v3_small"
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def trained_by_others(name=NAME, n_classes=1000, seed=7):
    """An architecture as somebody else has trained it, weights and statistics."""
    torch.manual_seed(seed)
    network = get_model(name, num_classes=n_classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def network():
    return trained_by_others()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "others.pth"
    torch.save(network.state_dict(), path)
    return path


def transfer(**fields):
    return get_recipe("transfer", **{"model": NAME, "input_size": 48, "bs": 64, "epochs": 3, "lr": 0.01, **fields})


def without_last_layer(network):
    network.classifier[3] = nn.Identity()
    return network


# --- networks ----------------------------------------------------------------------------------------------------


def test_with_equal_weights_it_computes_what_fastais_own_network_does():
    theirs = create_vision_model(resnet18, 5, pretrained=False, concat_pool=False)
    ours = create_architecture("resnet18", 5, 64)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    layers = [layer for layer in theirs[1].modules() if not [*layer.children()]]
    assert [type(layer) for layer in ours.head] == [type(layer) for layer in layers[2:]]  # after pooling and flattening
    assert [layer.p for layer in ours.head if isinstance(layer, nn.Dropout)] == [0.25, 0.5]
    x = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-4)


LAST_LAYERS = {
    "mobilenet_v2": "classifier.1",
    "shufflenet_v2_x0_5": "fc",
    "squeezenet1_1": "classifier.1",
    "mnasnet0_5": "classifier.1",
    "regnet_x_400mf": "fc",
}


@pytest.mark.parametrize("name", LAST_LAYERS)
def test_the_body_gives_what_the_architecture_gives_its_last_layer(name):
    network, seen = trained_by_others(name), []
    network.get_submodule(LAST_LAYERS[name]).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model, x = create_architecture(name, 5, 64).eval(), torch.randn(2, 3, 64, 64)
    model.body.load_state_dict(network.state_dict(), strict=False)
    with torch.inference_mode():
        network(x)
        expected = seen[0] if seen[0].ndim == 2 else seen[0].relu().mean(dim=(2, 3))
        assert torch.allclose(model.body(x), expected, atol=1e-5)
        assert model(x).shape == (2, 5)


def test_attention_is_not_taken_for_maps():
    """Of a swin transformer's last square outputs most are attention matrices, (N, heads, tokens, tokens)."""
    body = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=0)
    _, layer = pretrained.look_through(body, 224)
    assert not isinstance(body.get_submodule(layer), nn.Dropout | nn.Softmax) and "attn" not in layer


def test_images_are_enlarged_on_the_way():
    model, x, seen = create_architecture("resnet18", 5, 80).eval(), torch.randn(2, 3, 32, 32), []
    model.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(x)
    (enlarged,) = seen
    assert enlarged.shape == (2, 3, 80, 80)
    assert torch.allclose(enlarged, nn.functional.interpolate(x, scale_factor=2.5, mode="bilinear"), atol=1e-6)


def test_large_images_are_not_made_smaller():
    assert create_pretrained(transfer(pretrained=False, input_size=48), 5, size=64).side == 64


def test_a_network_for_one_size_says_so():
    with pytest.raises(UserError, match=r"'vit_b_32' cannot see images of 48 x 48 .*Expected 224.*--input-size"):
        create_architecture("vit_b_32", 5, 48)


def test_networks_of_timm(tmp_path):
    network = timm.create_model("test_resnet").eval()
    save_file(network.state_dict(), tmp_path / "timm.safetensors")
    recipe, x = transfer(model="test_resnet", weights=str(tmp_path / "timm.safetensors")), torch.randn(2, 3, 48, 48)
    model = create_pretrained(recipe, 5, 32).eval()
    with torch.inference_mode():
        assert torch.allclose(model.body(x), network.forward_head(network.forward_features(x), pre_logits=True), atol=1e-6)
        assert model(x[..., :32, :32]).shape == (2, 5)
    assert channel_stats(recipe) == (timm.get_pretrained_cfg("test_resnet").mean, timm.get_pretrained_cfg("test_resnet").std)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet81", "Did you mean 'resnet18'"),
        ("smal", "Did you mean 'small'"),
        ("googlenet", "no model"),
        ("hf-hub:x/y", "no model"),
    ],
)
def test_unknown_names_get_the_nearest(name, words):
    with pytest.raises(UserError, match=words) as caught:
        check_model(transfer(model=name))
    assert caught.value.exit_code == 2 and "small, base, slim, deep, large" in str(caught.value)


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("n_classes", [1000, 5])
def test_a_file_of_weights_gives_the_features_of_its_network_and_a_new_head(tmp_path, kind, n_classes):
    network, path = trained_by_others(n_classes=n_classes), tmp_path / f"weights.{kind}"
    (torch.save if kind == "pth" else save_file)(network.state_dict(), path)
    torch.manual_seed(1)
    first, second = (create_pretrained(transfer(weights=str(path)), 5, 32).eval() for _ in range(2))
    x = torch.randn(4, 3, 48, 48)
    with torch.inference_mode():
        assert torch.allclose(first.body(x), without_last_layer(network)(x), atol=1e-5)
        assert torch.equal(first.body(x), second.body(x)) and not torch.equal(first.head[2].weight, second.head[2].weight)


def test_counts_of_batches_may_be_missing_as_in_old_files(network, tmp_path):
    old = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    torch.save(old, tmp_path / "old.pth")
    create_pretrained(transfer(weights=str(tmp_path / "old.pth")), 5, 32)


def save_changed(network, path, change):
    state = network.state_dict()
    change(state)
    torch.save(state, path)


MISFITS = {
    "a shape": (lambda s: s.update({"features.0.0.weight": torch.zeros(8, 3, 3, 3)}),
                r"features\.0\.0\.weight is \(8, 3, 3, 3\) there, \(16, 3, 3, 3\) in the model"),
    "a layer less": (lambda s: s.pop("features.1.block.0.0.weight"), r"features\.1\.block\.0\.0\.weight is missing"),
    "a layer more": (lambda s: s.update({"features.99.weight": torch.zeros(1)}), r"has no 'features\.99\.weight'"),
    "all other": (lambda s: (s.clear(), s.update(resnet18().state_dict())), r"features\.0\.0\.weight is missing"),
}  # fmt: skip


@pytest.mark.parametrize("how", MISFITS)
def test_weights_that_do_not_fit_are_refused_by_the_name_of_the_layer(network, tmp_path, how):
    change, words = MISFITS[how]
    save_changed(network, tmp_path / "w.pth", change)
    with pytest.raises(UserError, match=words) as caught:
        create_pretrained(transfer(weights=str(tmp_path / "w.pth")), 5, 32)
    assert caught.value.exit_code == 2 and f"not {NAME}'s" in str(caught.value)


class _Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_files_that_are_none_are_refused_and_never_run(tmp_path):
    canary = tmp_path / "canary"
    files = {
        "hostile.pth": pickle.dumps({"conv1.weight": _Canary(canary)}),
        "page.pth": b"<html>Sign in</html>",
        "empty.pth": b"",
        "page.safetensors": b"<html>Sign in</html>",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({0: torch.zeros(1)}, tmp_path / "numbers.pth")
    for name in (*files, "list.pth", "numbers.pth", "nowhere.pth"):
        with pytest.raises(DataError, match=name) as caught:
            create_pretrained(transfer(weights=str(tmp_path / name)), 5, 32)
        assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["resnet18", "test_resnet"], ids=["torchvision", "timm"])
def test_without_a_network_the_way_out_is_told(tmp_path, name):
    nowhere = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path), "HF_HOME": str(tmp_path)}
    done = call("train.py", "--data", "digits", "--model", name, cwd=tmp_path, env=environment(**nowhere))
    assert_clear_error(
        done, 3, f"'{name}' cannot be had", "Connection refused", "--weights FILE", "--from-scratch", "https://"
    )
    assert not (tmp_path / "runs").exists()


def test_weights_that_nobody_publishes():
    with pytest.raises(DataError, match=r"no weights of 'beit3_giant_patch14_224': train --from-scratch"):
        try_model(transfer(model="beit3_giant_patch14_224"))


def test_a_silent_server_is_not_waited_for(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of its first use
        monkeypatch.setattr(pretrained, "TIMEOUT", 0.3)
        with pytest.raises(DataError, match=r"timed out[^\n]*\n[^\n]*--weights"):
            try_model(transfer(model="resnet18"))
    assert socket.getdefaulttimeout() is None


def test_weights_kept_from_an_earlier_download_need_no_network(tmp_path, monkeypatch, capsys):
    """torch.hub keeps them under their published name, which holds the beginning of their sha256."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    network = trained_by_others("squeezenet1_1")
    url = pretrained._published_at("squeezenet1_1")
    torch.save(network.state_dict(), folder / url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model, x = create_pretrained(transfer(model="squeezenet1_1"), 5, 32).eval(), torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        assert torch.allclose(model.body.features(x), network.features(x), atol=1e-5)
    assert capsys.readouterr().err == ""


def test_contradictions_are_refused(weights, capsys):
    with pytest.raises(UserError, match="takes no weights"):
        transfer(weights=str(weights), pretrained=False)
    with pytest.raises(UserError, match=r"--weights is for pretrained models.*'small'"):
        check_model(transfer(model="small", weights=str(weights)))
    assert main("train", ["--data", "digits", "--model", "small", "--pretrained"]) == 2
    assert "starts from scratch" in capsys.readouterr().err


# --- training ----------------------------------------------------------------------------------------------------


class Watch(Callback):
    """The weights and statistics before the training and after each of its epochs, and what may learn in it."""

    def before_fit(self):
        self.states, self.learning, self.rates = [self.state()], [], []

    def before_batch(self):
        self.learns = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def after_train(self):
        self.states.append(self.state())
        self.learning.append(self.learns)
        self.rates.append([group["lr"] for group in self.opt.opt.param_groups])

    def state(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def watched(recipe):
    learn = create_learner(dataloaders("digits", recipe, subset=150), recipe, seed=1)
    watch = Watch()
    with learn.no_bar(), learn.no_logging():
        fit(learn, recipe, [watch])
    return learn, watch


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_body_is_frozen_at_first_but_for_its_normalisation(weights):
    learn, watch = watched(transfer(weights=str(weights), frozen_epochs=2))
    norms = {name for name, module in learn.model.body.named_modules() if isinstance(module, norm_types)}
    body = {f"body.{name}": name.rpartition(".")[0] in norms for name in learn.model.body.state_dict()}
    in_norms, elsewhere = ({name for name, is_norm in body.items() if is_norm == wanted} for wanted in (True, False))
    for epoch in (0, 1):
        moved = changed(watch.states[epoch], watch.states[epoch + 1])
        assert not moved & elsewhere, "convolutions do not move"
        assert {name for name in in_norms if "running" in name} <= moved, "statistics follow the new images"
        assert {name for name in moved if name.startswith("head")} >= {"head.2.weight", "head.6.weight"}
        assert watch.learning[epoch] & elsewhere == set() and watch.learning[epoch] & in_norms
    assert {name for name in elsewhere if name.endswith("weight")} <= changed(watch.states[2], watch.states[3])
    assert all(parameter.requires_grad for parameter in learn.model.parameters()), "and nothing stays frozen afterwards"


def test_one_cycle_spans_both_phases_with_a_rate_for_each_depth(weights):
    learn, watch = watched(transfer(weights=str(weights), pct_start=0.5, body_lr_factor=0.01))
    for rates in watch.rates:
        assert [rate / rates[2] for rate in rates] == pytest.approx([0.01, 0.1, 1])
    lrs = learn.recorder.lrs
    assert (
        max(lrs) == pytest.approx(0.01, rel=0.1)
        and lrs[0] == pytest.approx(0.01 / 5)
        and len(lrs) == 3 * len(learn.dls.train)
    )
    grouped = [id(parameter) for group in learn.opt.opt.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, learn.model.parameters()))


def test_weight_decay_is_not_strengthened_where_the_rate_is_low(weights):
    recipe = transfer(weights=str(weights), wd=0.02)
    learn = create_learner(dataloaders("digits", recipe, subset=150), recipe)
    learn.create_opt()
    assert [group["weight_decay"] for group in learn.opt.opt.param_groups] == [0.02] * 3


def test_pretrained_networks_see_images_normalised_as_theirs_were(weights):
    def stats(recipe):
        dls = dataloaders("digits", recipe, subset=150)
        normalize = dls.valid.after_batch.normalize
        return [stat.flatten().tolist() for stat in (normalize.mean, normalize.std)], dls.data.channel_stats

    assert np.allclose(stats(transfer(weights=str(weights)))[0], IMAGENET)
    for recipe in (transfer(pretrained=False), get_recipe("classic-adam")):
        assert np.allclose(*stats(recipe))


def test_from_scratch_all_of_it_learns_from_the_start_at_one_rate():
    recipe = transfer(pretrained=False, epochs=1)
    learn, watch = watched(recipe)
    assert watch.learning == [{name for name, _ in learn.model.named_parameters()}]
    assert len(watch.rates[0]) == 1


@pytest.mark.parametrize("name", ["fast", "classic-sgd"])
def test_other_recipes_train_such_networks_too(weights, name):
    recipe = get_recipe(name, model=NAME, weights=str(weights), bs=64, lr=0.01, epochs=1, input_size=32)
    learn, _ = watched(recipe)
    assert math.isfinite(learn.recorder.values[-1][0])


def test_a_search_for_a_learning_rate_freezes_nothing_and_keeps_the_rates_proportion(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("test_resnet").state_dict(), "mine.safetensors")
    recipe = without_epochs(transfer(model="test_resnet", weights="mine.safetensors", bs=16))
    learn = create_learner(dataloaders("digits", recipe, subset=100), recipe, seed=1)
    learn.path = tmp_path
    learn.add_cb(watch := Watch())
    search_lr(learn, recipe)
    assert all(learning == {name for name, _ in learn.model.named_parameters()} for learning in watch.learning)
    for rates in watch.rates:
        assert [rate / rates[2] for rate in rates] == pytest.approx([0.01, 0.1, 1])
    arguments = ["--data", "digits", "--subset", "100", "--model", "test_resnet", "--weights", "mine.safetensors"]
    assert main("find-lr", arguments) == 0
    out = capsys.readouterr().out
    assert "recipe transfer" in out and "from mine.safetensors (sha256" in out and "--weights mine.safetensors --lr" in out


# --- from training to prediction ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    """A whole run, after which the file of weights is gone."""
    cwd = tmp_path_factory.mktemp("run")
    mine = shutil.copy(weights, cwd / "mine.pth")
    options = RunOptions(source="digits", subset=200, out=cwd / "runs", exports=cwd / "exports", name="x")
    folder = run(transfer(weights=str(mine), epochs=2), options)
    mine.unlink()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(cwd / "photo.png")
    return cwd, folder, cwd / "exports" / "x"


def test_a_run_tells_where_its_weights_came_from(finished, weights):
    import hashlib

    _, folder, export = finished
    origin = f"from mine.pth (sha256 {hashlib.sha256(weights.read_bytes()).hexdigest()})"
    assert json.loads((folder / "metrics.json").read_text())["weights"] == origin
    config = json.loads((export / "config.json").read_text())
    assert (config["model"], config["size"], config["input_size"]) == (NAME, 32, 48)
    assert config["training"]["weights"] == origin and np.allclose([config["mean"], config["std"]], IMAGENET)
    assert origin in (export / "README.md").read_text() and "48 x 48" in (export / "README.md").read_text()
    assert (folder / "top_losses.png").is_file() and (folder / "report.html").is_file()


def test_the_threshold_of_familiarity_is_of_the_features_lengths(finished):
    _, _, export = finished
    export, seen = load_export(export), []
    export.model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    recipe, data = transfer(pretrained=False), load_data("digits", 32)
    rows = np.sort(dataloaders(data, recipe, subset=200).valid.items)  # the division depends on the seed alone
    images = torch.from_numpy(data.images[rows]).permute(0, 3, 1, 2)
    export.scores(images)
    lengths = np.linalg.norm(seen[0].numpy(), axis=1)
    below = export.config["unfamiliar_below"]
    assert below == pytest.approx(unfamiliar_below(torch.from_numpy(lengths)), rel=1e-4)
    assert export.unfamiliar(images).tolist() == (lengths < below).tolist()


def test_the_export_as_onnx_answers_the_same(finished, tmp_path):
    path, difference, _ = write_onnx(shutil.copytree(finished[2], tmp_path / "x"))
    assert path.is_file() and difference < 1e-6


def test_a_resumed_training_is_the_same_training(weights, tmp_path, monkeypatch):
    recipe = transfer(weights=str(weights), bs=32, frozen_epochs=1)
    whole = train_in_legs(tmp_path / "whole", recipe, [])
    monkeypatch.setattr(resuming, "SAVE_SECONDS", 0)  # after every batch
    assert_same_training(whole, train_in_legs(tmp_path / "cut", recipe, [(0, 1), (1, 1), (2, 2)]))


def test_a_run_goes_on_without_its_first_weights_once_it_has_its_own(finished, tmp_path, monkeypatch):
    _, folder, _ = finished
    before = json.loads((folder / "metrics.json").read_text())
    again = shutil.copytree(folder, tmp_path / "again")
    (again / "metrics.json").unlink()
    monkeypatch.chdir(tmp_path)
    resume(again)
    after = json.loads((again / "metrics.json").read_text())
    assert all(after[key] == before[key] for key in ("weights", "test_loss", "temperature", "unfamiliar_below"))


def test_a_run_that_has_none_of_its_own_yet_needs_the_same_weights(finished, weights, tmp_path):
    _, folder, _ = finished
    again = shutil.copytree(folder, tmp_path / "again")
    config = json.loads((again / "config.json").read_text())
    for name in ("metrics.json", "checkpoints/last.pth", "checkpoints/previous.pth"):
        (again / name).unlink()
    with pytest.raises(DataError, match=r"mine\.pth cannot be read"):
        resume(again)
    other = tmp_path / "mine.pth"
    save_changed(trained_by_others(), other, lambda state: state["features.0.0.weight"].mul_(2))
    config["recipe"]["weights"] = str(other)
    (again / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"began from mine.*put the same weights back"):
        resume(again)


def test_every_road_gives_the_same_probabilities(finished):
    cwd, _, export = finished
    answer = Classifier(export).predict(cwd / "photo.png")
    learn = load_learner(export)
    assert [answer[name] for name in learn.dls.vocab] == learn.predict(cwd / "photo.png")[2].tolist()
    assert sum(Classifier(export).predict(cwd / "photo.png", tta=True).values()) == pytest.approx(1)
    pickled = f"from fastai.learner import load_learner; learn = load_learner({str(export / 'export.pkl')!r})"
    code = f"{pickled}; print(learn.predict('photo.png')[2].tolist())"
    done = call("-W", "ignore", "-c", code, cwd=cwd)
    assert json.loads(done.stdout) == [answer[name] for name in learn.dls.vocab], done.stderr


def test_prediction_needs_torchvision_but_not_fastai(finished):
    cwd, _, export = finished
    code = (
        "import sys; from cifar_fastai.cli import main\n"
        f"assert main('predict', ['--export', {str(export)!r}, 'photo.png']) == 0\n"
        "assert 'torchvision' in sys.modules and 'fastai' not in sys.modules and 'timm' not in sys.modules"
    )
    done = call("-c", code, cwd=cwd)
    assert done.returncode == 0 and done.stdout.startswith("photo.png\t"), done.stderr


def test_a_finished_run_is_evaluated_and_exported_without_its_first_weights(finished, tmp_path):
    _, folder, export = finished
    before = json.loads((folder / "metrics.json").read_text())
    assert evaluate_run(folder)["test_loss"] == pytest.approx(before["test_loss"], rel=1e-4)
    again = load_export(reexport_run(folder, tmp_path)).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in load_export(export).model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "resnet18"}, "does not fit"),
        ({"model": "hf-hub:x/y"}, "not known here"),
        ({"model": "vit_b_32"}, "cannot see images of 48 x 48"),
        ({"input_size": 10**6}, "input_size must be a whole number from 16 to 512"),
        ({"input_size": 16}, "input_size must be no smaller than size"),
        ({"input_size": 64}, "other probabilities"),
    ],
    ids=str,
)
def test_changed_exports_are_refused(finished, tmp_path, changes, words):
    export = shutil.copytree(finished[2], tmp_path / "x")
    config = json.loads((export / "config.json").read_text()) | changes
    (export / "config.json").write_text(json.dumps(config))
    write_manifest(export)
    with pytest.raises(ExportError, match=words):
        load_export(export)


def test_weights_that_never_end_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in ("/dev/zero", str(tmp_path / "pipe.pth"), str(tmp_path)):
        recipe = transfer(weights=path)
        for use in (weights_origin, try_model):
            with pytest.raises(DataError, match=r"cannot be read \(it is no regular file"):
                use(recipe)
