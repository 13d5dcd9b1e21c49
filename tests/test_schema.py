"""What the JSON files of runs and exports may hold: all that was ever written, and nothing that could do harm."""

import importlib.util
import json
import time

import pytest
from helpers.commands import ROOT

from cifar_fastai import schema
from cifar_fastai.errors import UserError
from cifar_fastai.recipes import RECIPES, get_recipe
from cifar_fastai.schema import METRICS, Corruptions, ExportConfig, Metrics, RunConfig, checked, read, written

RUNS = sorted(path.parent for path in (ROOT / "results").glob("*/config.json"))
RUN = ROOT / "results" / "cpu"


def changed(content: dict, place: str, value) -> dict:
    """A copy with one field replaced; it is taken out where the value is ... ."""
    content = json.loads(json.dumps(content))
    *way, last = place.split(".")
    holder = content
    for step in way:
        holder = holder[int(step) if isinstance(holder, list) else step]
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    return content


@pytest.mark.parametrize("run", RUNS, ids=[run.name for run in RUNS])
def test_every_published_run_can_be_read(run):
    config = read(RunConfig, run / "config.json", whole=True)
    assert config["recipe"].keys() == json.loads(json.dumps(get_recipe("cpu").__dict__)).keys()
    assert read(Metrics, run / METRICS) == json.loads((run / METRICS).read_bytes())


def test_what_older_versions_lack_has_a_default():
    config = read(RunConfig, ROOT / "results" / "classic-adam" / "config.json", whole=True)
    assert (config["recipe"]["flip"], config["recipe"]["size"], config["trackers"]) == ("random", 32, [])
    assert (config["fingerprint"], config["initial_weights"], config["processes"]) == (None, "from scratch", 1)


def test_the_shipped_export_is_as_it_was():
    content = json.loads((ROOT / "exports" / "cifar10" / "config.json").read_bytes())
    assert checked(ExportConfig, "config.json", content) == content | {"tta_views": ["mirror", "shift"]}


@pytest.mark.parametrize("kind", [RunConfig, schema.RecipeFields, Metrics, schema.DataFigures, Corruptions, ExportConfig,
                                  schema.TestFigures, schema.TrainingFigures, schema.ClassFigures])  # fmt: skip
def test_every_field_has_a_meaning(kind):
    assert all(field.description and "\n" not in field.description for field in kind.model_fields.values())
    assert kind.model_json_schema()["additionalProperties"] is False


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_comes_back_as_it_was(recipe):
    content = changed(json.loads((RUN / "config.json").read_bytes()), "recipe", json.loads(json.dumps(recipe.__dict__)))
    assert schema.to_recipe(checked(RunConfig, "config.json", content, whole=True)["recipe"]) == recipe


CONFIG_EDITS = [
    ("recipe.lr", "abc", "recipe.lr must be a number, not 'abc'."),
    ("recipe.lr", -1, "recipe: lr must be a positive number, not -1; the recipes use 0.001 to 1.5."),
    ("recipe.size", "32", "recipe.size must be a whole number from -1,000,000,000 to 1,000,000,000, not '32'."),
    ("recipe.epochs", 10**18, "recipe.epochs must be a whole number from"),
    ("recipe.epochs", True, "recipe.epochs must be a whole number from"),
    ("recipe.model", 5, "recipe.model must be text without control characters, not 5."),
    ("recipe.moms", [0.9], "recipe.moms must be three numbers."),
    ("recipe.flip", "z" * 1000, "recipe: flip must be one of random, alternating, off, not 'zzz"),
    ("recipe.code", "x", "recipe.code is no field that this version knows."),
    ("recipe", [], "recipe must hold fields, not a list."),
    ("name", "/home/you/Documents", "name must be up to 100 letters, digits, '.', '_' and '-'"),
    ("name", "..", "name must be up to 100 letters"),
    ("name", "a\n", "name must be up to 100 letters"),
    ("name", "a" * 101, "name must be up to 100 letters"),
    ("name", None, "name must be up to 100 letters"),
    ("name", ..., "name is missing."),
    ("seed", 1 << 32, "seed must be a whole number from 0 to 4,294,967,295, not 4294967296."),
    ("subset", 0, "subset must be a whole number from 1"),
    ("device", "cuda:1; rm", "device must be cuda, mps or cpu, not 'cuda:1; rm'."),
    ("trackers", ["os"], "trackers must be a list of 'tensorboard' and 'wandb'."),
    ("command", "python train.py\nrm -r ~", r"command must be a line of text, not 'python train.py\nrm -r ~'."),
    ("data", "\x1b[2J", r"data must be a line of text, not '\x1b[2J'."),
    ("processes", 0, "processes must be a whole number from 1"),
    ("versions", {"torch": 2}, "versions must be names of packages with their versions."),
    ("more\x1b[2J", 1, r"'more\x1b[2J' is no field that this version knows."),
]  # fmt: skip
METRICS_EDITS = [
    ("test_accuracy", 1.01, "test_accuracy must be a share from 0 to 1, not 1.01."),
    ("ece", "0", "ece must be a share from 0 to 1, not '0'."),
    ("n_params", 10**17, "n_params must be a whole number from 1 to 10^15"),
    ("train_seconds", 1e300, "train_seconds must be a number from 0 to 10^15, not 1e+300."),
    ("valid_loss", -1, "valid_loss must be a number, 0 or more, not -1."),
    ("hardware", "a\x07", r"hardware must be a line of 1 to 255 characters, not 'a\x07'."),
    ("classes", ["a", "a"], "classes must be 2 to 1,500 different names"),
    ("per_class", {}, "per_class must have a row for each class, and no others."),
    ("per_class_accuracy", ..., "per_class_accuracy is missing."),
    ("per_class.cat", [], "per_class.cat must hold fields, not a list."),
    ("per_class.cat.recall", "<b>", "per_class.cat.recall must be a share from 0 to 1, not '<b>'."),
    ("confusion_matrix", [[1] * 10] * 9, "confusion_matrix must have a row and a column for each class."),
    ("confusion_matrix", [[1] * 10] * 10, "confusion_matrix must hold the data.n_test test images, class by class."),
    ("reliability.0.count", 0, "reliability.0.count must be a whole number from 1 to 10^15, not 0."),
    ("confused_pairs.0.class", 3, "confused_pairs.0.class must be a line of 1 to 255 characters, not 3."),
    ("data.n_test", 0, "data.n_test must be a whole number from 1"),
    ("data", "digits", "data must hold fields, not 'digits'."),
]


@pytest.mark.parametrize(
    ("kind", "file", "place", "value", "words"),
    [(RunConfig, "config.json", *edit) for edit in CONFIG_EDITS] + [(Metrics, METRICS, *edit) for edit in METRICS_EDITS],
)
def test_an_edit_is_refused_in_one_line_that_names_the_field(tmp_path, kind, file, place, value, words):
    content = json.loads((RUN / file).read_bytes())
    assert checked(kind, file, content)
    (tmp_path / file).write_text(json.dumps(changed(content, place, value)))
    with pytest.raises(UserError) as caught:
        read(kind, tmp_path / file)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / file}: {words}")
    assert message.isprintable() and len(message) < len(str(tmp_path)) + 330 and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"name": NaN}', "NaN is no JSON"),
        ('{"seed": 1' + "0" * 400 + "}", "a number out of range"),
        ('{"seed": 1e999}', "a number out of range"),
        ('{"seed": 1, "seed": 2}', "a key stands there twice"),
        ("[" * 100_000, "recursion"),
        ("[]", "no JSON object"),
        ("{" + ",".join(f'"k{i}": 1' for i in range(60_000)) + "}", "more than 50,000 fields"),
        ('{"name": "' + "a" * 1_000_000 + '"}', "it is far too long"),
        ("\ufeff{}", "is damaged"),
    ],
)
def test_what_is_not_read_at_all(tmp_path, text, words):
    path, before = tmp_path / "config.json", time.process_time()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        read(RunConfig, path)
    assert len(str(caught.value)) < len(str(path)) + 200 and time.process_time() - before < 5


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match="no regular file"):
        read(RunConfig, tmp_path / "config.json")


def test_what_could_not_be_read_is_not_written():
    content = json.loads((RUN / "config.json").read_bytes())
    assert json.loads(written(RunConfig, "config.json", content)) == content
    for place, value, words in (
        ("name", "a b", "name must be"),
        ("recipe.lr", float("nan"), "NaN is no JSON"),
        ("data", "\udcff", "cannot hold a name that is not Unicode"),
    ):
        with pytest.raises(UserError, match=words):
            written(RunConfig, "config.json", content | changed({**content}, place, value))


def test_edited_runs_do_no_harm(digits_run, tmp_path, monkeypatch):
    """benchmarks/tamper.py, which does it 300 times and more."""
    spec = importlib.util.spec_from_file_location("tamper", ROOT / "benchmarks" / "tamper.py")
    tamper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tamper)
    monkeypatch.chdir(tmp_path)
    result = tamper.tamper_with_run(digits_run.folder, 30, seed=1)
    assert result["faults"] == []
    refused = sum(counts.get("refused", 0) for counts in result["edits"].values())
    assert len(result["edits"]) == 4 and refused >= 15
