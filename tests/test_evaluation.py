"""Every figure of a run against an independent computation on its predictions, and the pictures by their content."""

import csv
import json
import re
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.commands import call_here
from PIL import Image
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
    recall_score,
    top_k_accuracy_score,
)
from torchmetrics.functional.classification import multiclass_calibration_error

from cifar_fastai import Classifier, figures
from cifar_fastai import metrics as our_metrics
from cifar_fastai.artifacts import load_export
from cifar_fastai.cache import load_data
from cifar_fastai.evaluation import Interpretation, Predictions

PICTURES = (
    "loss_curve lr_schedule confusion_matrix per_class_accuracy reliability risk_coverage top_losses confident_mistakes "
    "predictions samples filters"
).split()
METRICS = (
    "test_accuracy test_accuracy_tta test_loss valid_accuracy valid_loss per_class_accuracy confusion_matrix classes ece "
    "n_params epochs_run best_epoch train_seconds images_per_second peak_memory_mb data versions device seed git_commit"
).split()


@pytest.fixture(scope="module")
def metrics(digits_run):
    return json.loads((digits_run.folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def predictions(digits_run):
    with (digits_run.folder / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_training_learned(metrics):
    assert metrics["test_accuracy"] > 0.9 and metrics["valid_accuracy"] > 0.9


def test_all_figures_are_there(metrics):
    assert set(METRICS) <= metrics.keys()
    assert metrics["data"]["source"] == "digits"
    assert [metrics["data"][key] for key in ("n_train", "n_valid", "n_test")] == [1293, 144, 360]
    assert metrics["seed"] == 42 and metrics["device"] == "cpu" and metrics["epochs_run"] == 8
    assert 0 < metrics["peak_memory_mb"] < 2000 and metrics["train_seconds"] > 0


def test_predictions_are_the_test_split_in_order(predictions):
    data = load_data("digits")
    assert [int(row["index"]) for row in predictions] == list(range(360))
    assert [row["label"] for row in predictions] == [data.classes[label] for label in data.labels[data.n_train :]]


def test_figures_against_scikit_learn(metrics, predictions):
    labels, predicted = ([row[column] for row in predictions] for column in ("label", "predicted"))
    classes = metrics["classes"]
    assert metrics["test_accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert metrics["confusion_matrix"] == confusion_matrix(labels, predicted, labels=classes).tolist()
    recalls = recall_score(labels, predicted, labels=classes, average=None)
    assert list(metrics["per_class_accuracy"].values()) == pytest.approx(recalls.tolist())


def test_calibration_error_by_hand(metrics, predictions):
    confidences = np.array([float(row["confidence"]) for row in predictions])
    right = np.array([row["label"] == row["predicted"] for row in predictions])
    bins = np.minimum((confidences * 15).astype(int), 14)
    gaps = [abs(confidences[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in set(bins)]
    assert metrics["ece"] == pytest.approx(sum(gaps), abs=1e-4)


def test_the_export_repeats_the_predictions(digits_run, metrics, predictions):
    data = load_data("digits")
    classifier = Classifier(digits_run.export)
    answers = classifier.predict_batch(data.images[data.n_train :])
    assert [next(iter(answer)) for answer in answers] == [row["predicted"] for row in predictions]
    confidences = [next(iter(answer.values())) for answer in answers]
    assert confidences == pytest.approx([float(row["confidence"]) for row in predictions], abs=1e-5)
    truth = [data.classes[label] for label in data.labels[data.n_train :]]
    losses = [-np.log(answer[label]) for answer, label in zip(answers, truth, strict=True)]
    assert metrics["test_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    tta = [next(iter(answer)) for answer in classifier.predict_batch(data.images[data.n_train :], tta=True)]
    assert metrics["test_accuracy_tta"] == pytest.approx(accuracy_score(truth, tta))


def test_interpretation_computes_fastais_own_matrix(trained):
    """Ours, from stored predictions, against the one fastai makes by running the model itself."""
    from fastai.interpret import ClassificationInterpretation

    from cifar_fastai.evaluation import predict

    data = load_data("digits")
    trained.dls.valid.dataset.tls[0].tfms.fs[0].data = data  # give the loaded learner its images back
    trained.dls.valid.dataset.tls[1].tfms.fs[0].data = data
    dl = trained.dls.test_dl(range(data.n_train, data.n_train + 100), with_labels=True)
    ours = Interpretation(trained, dl, replace(predict(trained, dl), temperature=trained.loss_func.temperature))
    theirs = ClassificationInterpretation.from_learner(trained, dl=dl)
    assert (ours.confusion_matrix() == theirs.confusion_matrix()).all()
    assert ours.confusion_matrix().sum() == 100
    assert torch.allclose(ours.losses, torch.as_tensor(theirs.losses), atol=1e-4)
    assert ours.most_confused(min_val=1) == theirs.most_confused(min_val=1)


def test_losses_of_impossible_confidence_are_finite():
    certain = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])
    predictions = Predictions(certain, certain, torch.tensor([1, 1]), torch.ones(2))
    assert predictions.losses.isfinite().all() and predictions.accuracy == 0.5


# --- against other libraries, on logits made up ------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_up():
    """Logits of a classifier that is right now and then and far too sure of it, and their labels.

    Of normal scores with unit variance, the right one's mean higher by 1.5, the log-likelihoods are 1.5 times the scores:
    four times the scores are calibrated by a temperature of 4 / 1.5.
    """
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (2000,), generator=random)
    logits = torch.randn(2000, 5, generator=random) + 1.5 * torch.nn.functional.one_hot(labels, 5)
    return 4 * logits, labels


def test_per_class_figures_against_scikit_learn(metrics, predictions):
    labels, predicted = ([row[column] for row in predictions] for column in ("label", "predicted"))
    columns = precision_recall_fscore_support(labels, predicted, labels=metrics["classes"], zero_division=0)
    for number, name in enumerate(("precision", "recall", "f1", "support")):
        ours = [figures[name] for figures in metrics["per_class"].values()]
        assert ours == pytest.approx(columns[number].tolist())


def test_a_class_never_predicted_has_no_precision_and_no_error():
    figures = our_metrics.per_class(np.array([[3, 0], [2, 0]]), ["a", "b"])
    assert figures["b"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 2}


def test_confused_pairs_by_counting(metrics, predictions):
    pairs = Counter((row["label"], row["predicted"]) for row in predictions if row["label"] != row["predicted"])
    ours = {(pair["class"], pair["taken_for"]): pair["count"] for pair in metrics["confused_pairs"]}
    assert list(ours.values()) == sorted(pairs.values(), reverse=True)[:10]
    assert all(pairs[pair] == count for pair, count in ours.items())
    supports = Counter(row["label"] for row in predictions)
    assert all(pair["share"] == pytest.approx(pair["count"] / supports[pair["class"]]) for pair in metrics["confused_pairs"])


@pytest.mark.parametrize(("share", "n"), [(0.9, 10_000), (0.5, 7), (1.0, 30), (0.0, 30)])
def test_wilsons_interval_against_scipy(share, n):
    expected = binomtest(round(share * n), n).proportion_ci(0.95, method="wilson")
    ours = our_metrics.wilson_interval(round(share * n) / n, n)
    assert ours == pytest.approx([expected.low, expected.high], abs=1e-6)


def test_intervals_hold_what_they_should(metrics):
    for name in ("test_accuracy", "test_accuracy_tta", "valid_accuracy"):
        low, high = metrics[f"{name}_interval"]
        assert low < metrics[name] < high or metrics[name] == 1


def test_top2_against_scikit_learn(made_up):
    logits, labels = made_up
    assert our_metrics.accuracy(logits, labels, k=2) == pytest.approx(top_k_accuracy_score(labels, logits, k=2))


def test_temperature_against_a_search_by_hand(made_up):
    logits, labels = made_up

    def loss(temperature):
        targets = torch.full_like(logits, (1 - 2001 / 2002) / 4, dtype=torch.double)  # Platt's, of 2,000 images
        targets[torch.arange(2000), labels] = 2001 / 2002
        return torch.nn.functional.cross_entropy(logits.double() / temperature, targets).item()

    ours = our_metrics.fit_temperature(logits, labels)
    by_hand = minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-8}).x
    assert ours == pytest.approx(by_hand, rel=1e-4) and ours == pytest.approx(4 / 1.5, rel=0.03)
    sure, calibrated = (our_metrics.calibration_error((logits / t).softmax(dim=1), labels) for t in (1, ours))
    assert calibrated < 0.04 < sure


def test_a_perfect_classifier_gets_a_finite_temperature():
    labels = torch.arange(100) % 5
    logits = 10.0 * torch.nn.functional.one_hot(labels, 5)
    temperature = our_metrics.fit_temperature(logits, labels)
    assert (logits / temperature).softmax(dim=1).max() == pytest.approx(101 / 102, abs=1e-4)


def test_the_calibration_error_against_torchmetrics(made_up):
    logits, labels = made_up
    probabilities = logits.softmax(dim=1)
    expected = multiclass_calibration_error(probabilities, labels, num_classes=logits.shape[1], n_bins=15)
    assert our_metrics.calibration_error(probabilities, labels) == pytest.approx(expected.item(), abs=1e-6)
    assert sum(row["count"] for row in our_metrics.reliability(probabilities, labels)) == len(labels)


def test_of_many_filters_some_are_drawn():
    figure = figures.filters(np.random.default_rng(0).normal(size=(768, 3, 16, 16)))
    (axes,) = figure.axes
    assert len(axes.images) == 64 and "64 of its 768 filters of 16 x 16 pixels" in axes.get_title()


def test_risk_and_coverage_by_counting(metrics, predictions):
    confidences = np.array([float(row["confidence"]) for row in predictions])
    right = np.array([row["label"] == row["predicted"] for row in predictions])
    for row in metrics["risk_coverage"]:
        counted = confidences >= row["threshold"]
        assert row["coverage"] == pytest.approx(counted.mean(), abs=1e-3)
        assert row["accuracy"] == pytest.approx(right[counted].mean(), abs=2e-3)


def test_reliability_by_counting(metrics, predictions):
    confidences = np.array([float(row["confidence"]) for row in predictions])
    right = np.array([row["label"] == row["predicted"] for row in predictions])
    bins = [right[inside] for n in range(15) if (inside := (n / 15 <= confidences) & (confidences < (n + 1) / 15)).any()]
    bins[-1] = np.append(bins[-1], right[confidences == 1])
    assert [(row["count"], row["accuracy"]) for row in metrics["reliability"]] == [
        (len(inside), pytest.approx(inside.mean())) for inside in bins
    ]


def test_calibration_changes_no_prediction_and_lowers_the_validation_loss(metrics, digits_run):
    assert metrics["temperature"] != 1.0 and metrics["test_accuracy"] > 0.9
    config = json.loads((digits_run.export / "config.json").read_text())
    assert config["temperature"] == metrics["temperature"]


def test_one_validation_image_in_twenty_is_called_unfamiliar():
    familiarity = torch.arange(2000).flip(0) / 10
    threshold = our_metrics.unfamiliar_below(familiarity)
    assert (familiarity < threshold).double().mean() == 0.05


def test_false_alarms_by_asking_the_export(metrics, digits_run):
    data, export = load_data("digits"), load_export(digits_run.export)
    images = torch.from_numpy(data.images[data.n_train :]).permute(0, 3, 1, 2)
    assert export.unfamiliar(images).double().mean().item() == pytest.approx(metrics["false_alarm_rate"], abs=1 / 360)
    assert metrics["false_alarm_rate"] < 0.2
    noise = torch.randint(0, 256, (200, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert export.unfamiliar(noise // 8).double().mean() > 0.9, "dark noise is no digit"


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_not_blank(digits_run, name):
    picture = np.asarray(Image.open(digits_run.folder / f"{name}.png").convert("RGB"))
    assert min(picture.shape[:2]) > 200 and (picture == 255).mean() > 0.05
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_the_report_holds_everything_and_asks_for_nothing(digits_run, metrics):
    html = (digits_run.folder / "report.html").read_text()
    assert f"{metrics['test_accuracy']:.2%}" in html
    assert "python train.py --data digits --recipe classic-sgd --epochs 8 --bs 64 --name digits" in html
    assert html.count('src="data:image/png;base64,') == len(PICTURES)
    assert not re.search(r'(src|href)="(?!data:)', html) and len(html) < 5_000_000


def test_config_repeats_the_run(digits_run):
    from cifar_fastai import Recipe

    config = json.loads((digits_run.folder / "config.json").read_text())
    config["recipe"]["moms"] = tuple(config["recipe"]["moms"])
    recipe = Recipe(**config["recipe"])
    assert (recipe.name, recipe.epochs, recipe.bs) == ("classic-sgd", 8, 64)
    assert (config["data"], config["seed"], config["subset"]) == ("digits", 42, None)


# --- pictures that fail ------------------------------------------------------------------------------------------


def broken(*_, **__):
    raise ValueError("no ink")


@pytest.fixture
def unfinished(digits_run, tmp_path):
    """A run whose training is over, and nothing else."""
    folder = shutil.copytree(digits_run.folder, tmp_path / "runs" / "digits")
    for path in (folder / "metrics.json", folder / "report.html", *folder.glob("*.png")):
        path.unlink()
    return folder


def test_a_picture_that_fails_costs_neither_report_nor_export(unfinished, tmp_path, monkeypatch):
    for name in ("risk_coverage", "loss_curve", "image_grid"):
        monkeypatch.setattr(f"cifar_fastai.figures.{name}", broken)
    done = call_here("train", "--resume", unfinished, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    missing = {"risk_coverage", "loss_curve", "top_losses", "confident_mistakes", "predictions", "samples", "filters"}
    words = {f"warning: {name}.png could not be drawn (ValueError: no ink)." for name in missing}
    assert set(done.stderr.splitlines()) == words
    assert {path.stem for path in unfinished.glob("*.png")} == set(PICTURES) - missing
    assert (unfinished / "report.html").read_text().count("<img") == len(PICTURES) - len(missing)
    assert load_export(tmp_path / "exports" / "digits").classes and (unfinished / "predictions.csv").exists()
    assert "export" in json.loads((unfinished / "metrics.json").read_text())


def test_the_export_is_written_before_anything_is_drawn(unfinished, tmp_path, monkeypatch):
    """Whatever ends the process in a picture, the training's result is there, and resuming draws the rest."""
    with monkeypatch.context() as patch:
        patch.setattr("cifar_fastai.run.draw_training", broken)
        assert call_here("train", "--resume", unfinished, cwd=tmp_path).returncode == 1
    assert load_export(tmp_path / "exports" / "digits").classes
    assert json.loads((unfinished / "metrics.json").read_text())["test_accuracy"] > 0.9
    assert call_here("train", "--resume", unfinished, cwd=tmp_path).returncode == 0
    assert {path.stem for path in unfinished.glob("*.png")} == set(PICTURES) and (unfinished / "report.html").exists()
