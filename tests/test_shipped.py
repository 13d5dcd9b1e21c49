"""What comes with the repository: the export, the results, and what the pages say of them."""

import dataclasses
import json
import os
import sys
from statistics import mean

import numpy as np
import pytest
from helpers.commands import ROOT

from cifar_fastai import Classifier
from cifar_fastai.artifacts import load_export
from cifar_fastai.cache import load_data
from cifar_fastai.recipes import RECIPES

sys.path.append(str(ROOT / "tools"))
from quote_results import PAGES, quoted, seeds_of

EXPORT = ROOT / "exports" / "cifar10"
RUNS = {path.parent.name: json.loads(path.read_text()) for path in (ROOT / "results").glob("*/metrics.json")}
SHIPPED = RUNS["cpu-float32"]


def test_the_export_loads_and_is_small():
    export = load_export(EXPORT)
    assert len(export.classes) == 10 and not (EXPORT / "export.pkl").exists()
    listed = json.loads((EXPORT / "MANIFEST.json").read_text())["files"]
    assert set(listed) == {path.name for path in EXPORT.iterdir()} - {"MANIFEST.json"}
    assert sum(path.stat().st_size for path in EXPORT.iterdir()) < 30_000_000


def test_the_exports_figures_are_those_of_its_run():
    config = json.loads((EXPORT / "config.json").read_text())
    assert {key: SHIPPED[key] for key in config["test"]} == config["test"]
    assert config["training"]["git_commit"] == SHIPPED["git_commit"]


def test_what_ships_has_the_lowest_validation_loss():
    on_the_same_images = [run for run in RUNS.values() if run["data"]["fingerprint"] == SHIPPED["data"]["fingerprint"]]
    assert SHIPPED["valid_loss"] == min(run["valid_loss"] for run in on_the_same_images)


@pytest.mark.parametrize("name", ["cpu", "slim", "short", "fast", "classic-sgd", "classic-adam"])
def test_a_recipe_quotes_its_runs(name):
    runs = seeds_of(name)
    figures = [f"{mean(run[key] for run in runs) * 100:.2f} %" for key in ("test_accuracy", "test_accuracy_tta")]
    assert RECIPES[name].measured == (
        f"{figures[0]} on CIFAR-10's test split, {figures[1]} with TTA "
        f"(JPEG copy, {runs[0]['epochs_run']} epochs, n={len(runs)}, results/{name})"
    )
    assert all((run["epochs_run"], run["data"]["encoding"]) == (runs[0]["epochs_run"], "JPEG") for run in runs)


def test_the_pages_quote_the_results():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert quoted(text) == text, f"{page}: `python tools/quote_results.py` renews its figures"


def test_a_wrong_figure_is_renewed():
    share = "{cpu[test_accuracy]:.0%}"
    assert quoted(f"<!-- results: {share} -->1 %<!-- end -->") == f"<!-- results: {share} -->92 %<!-- end -->"
    with pytest.raises(KeyError):
        quoted("<!-- results: {cpu[no_such_figure]} --><!-- end -->")


def test_the_recipe_quotes_the_digits():
    runs, recipe = seeds_of("digits"), RECIPES["digits"]
    accuracy = mean(run["test_accuracy"] for run in runs)
    assert sorted(run["seed"] for run in runs) == [42, 43, 44, 45, 46] and accuracy >= 0.99
    assert all("dirty" not in run["git_commit"] for run in runs)
    assert recipe.measured.startswith(f"{accuracy * 100:.2f} % on the held-out fifth of scikit-learn's digits")
    config = json.loads((ROOT / "results" / "digits" / "config.json").read_text())
    command = f"&& {config['command']}\n"
    assert command in (ROOT / "README.md").read_text() and config["data"] == "digits", "the first command, without a network"
    own = {field: config["recipe"][field] for field in config["recipe"] if field != "measured"}
    now = dataclasses.asdict(recipe)
    assert {field: list(now[field]) if isinstance(now[field], tuple) else now[field] for field in own} == own


def test_no_result_holds_a_fault():
    serving, resume = (json.loads((ROOT / "results" / f"{name}.json").read_text()) for name in ("serving", "resume"))
    crowds = [*serving["concurrent"], serving["soak"]]
    assert not any(each[key] for each in crowds for key in ("lost", "wrong")) and not serving["v1_predict_batch"]["wrong"]
    assert abs(serving["soak"]["resident_mb_after"] - serving["soak"]["resident_mb_before"]) < 5
    assert not any(each["different"] for each in resume["trainings"].values())
    for name in ("tamper", "fuzz-images"):
        assert not json.loads((ROOT / "results" / f"{name}.json").read_text())["faults"]


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.skipif(not os.environ.get("CIFAR10_DATA"), reason="CIFAR10_DATA is not set")
def test_the_export_reproduces_its_score():
    data = load_data(os.environ["CIFAR10_DATA"])
    if data.fingerprint != SHIPPED["data"]["fingerprint"]:
        pytest.fail("CIFAR10_DATA holds other pixels than the export was measured on")
    classifier, predicted = Classifier(EXPORT), []
    for batch in np.array_split(data.images[data.n_train :], 20):
        predicted += [next(iter(answer)) for answer in classifier.predict_batch(batch)]
    truth = [data.classes[label] for label in data.labels[data.n_train :]]
    accuracy = np.mean([a == b for a, b in zip(predicted, truth, strict=True)])
    assert accuracy == pytest.approx(SHIPPED["test_accuracy"], abs=0.0005)
