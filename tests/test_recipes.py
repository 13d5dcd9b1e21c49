import dataclasses
import json
import os
import re
import time

import pytest
from helpers.commands import call, call_here

from cifar_fastai.cli import main
from cifar_fastai.errors import UserError
from cifar_fastai.models import MODELS
from cifar_fastai.pretrained import is_architecture
from cifar_fastai.recipes import RECIPES, Recipe, auto_recipe, get_recipe, recipe_toml


def test_recipes_are_frozen_and_overridden_by_name():
    recipe = get_recipe("fast", epochs=10, bs=512)
    assert (recipe.name, recipe.epochs, recipe.bs, recipe.lr) == ("fast", 10, 512, RECIPES["fast"].lr)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.epochs = 3


def test_the_originals_recipes():
    adam, sgd = get_recipe("classic-adam"), get_recipe("classic-sgd")
    assert (adam.optimizer, adam.lr, adam.valid_pct, adam.flip, adam.rotate > 0) == ("adam", 1e-3, 0.2, "random", True)
    assert (sgd.optimizer, sgd.valid_pct) == ("sgd", 0.1)
    assert all((sgd.translate, sgd.scale, sgd.perspective, sgd.brightness, sgd.contrast, sgd.saturation))


def test_every_recipe_names_a_model_and_itself():
    for name, recipe in RECIPES.items():
        assert recipe.name == name and recipe.about
        assert recipe.model in MODELS or is_architecture(recipe.model)
    assert {auto_recipe(device)[0] for device in ("cpu", "cuda", "mps")} <= RECIPES.keys()
    for model, fitting in (
        ("resnet18", "transfer"),
        ("small", "classic-sgd"),
        ("base", "cpu"),
        ("slim", "cpu"),
        ("deep", "cpu"),
        ("large", "cpu"),
    ):
        assert auto_recipe("cpu", model)[0] == fitting
    for device, model, fitting in (("cuda", None, "large"), ("cuda", "base", "fast"), ("mps", None, "fast")):
        assert auto_recipe(device, model, 50_000)[0] == auto_recipe(device, model)[0] == fitting
        assert auto_recipe(device, model, 2_000)[0] == "cpu"
    for device in ("cpu", "cuda", "mps"):
        assert auto_recipe(device, None, 1_437, "digits")[0] == "digits"
        assert auto_recipe(device, "small", 1_437, "digits")[0] == "classic-sgd"


@pytest.mark.parametrize("valid_pct", [0.1, 0.15, 0.2])
def test_valid_pct_inside_its_range(valid_pct):
    assert get_recipe("fast", valid_pct=valid_pct).valid_pct == valid_pct


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("valid_pct", 0.5, "between 0.10 and 0.20"),
        ("valid_pct", 0.0, "between 0.10 and 0.20"),
        ("valid_pct", float("nan"), "between 0.10 and 0.20"),
        ("epochs", 0, "at least 1"),
        ("bs", -1, "at least 1"),
        ("patience", 0, "at least 1"),
        ("lr", 0.0, "positive"),
        ("lr", float("nan"), "positive"),
        ("lr", float("inf"), "positive"),
        ("wd", -0.1, "positive"),
        ("optimizer", "adma", "one of adam, sgd, muon"),
        ("precision", "float16", "one of auto, float32, bfloat16"),
        ("muon_lr_factor", 0.0, "positive"),
        ("size", 16, "between 32 and 128"),
        ("size", 256, "between 32 and 128"),
        ("start_size", 8, "0 or lie between 16 and the size, 32"),
        ("start_size", 48, "0 or lie between 16 and the size, 32"),
        ("grow_pct", 1.0, "grow_pct must lie between"),
        ("input_size", 16, "between 32 and 512"),
        ("frozen_epochs", -1, "zero or more"),
        ("body_lr_factor", 0.0, "above 0"),
        ("flip", "sometimes", "random, alternating, off"),
        ("rotate", -1.0, "rotate must lie between 0 and 180"),
        ("scale", 1.0, "scale must lie between 0 and 0.9"),
        ("cutout", 64, "cutout must lie between 0 and 32"),
        ("mixup", float("nan"), "mixup must lie between"),
        ("pct_start", 0.0, "pct_start must lie between 0 and 1"),
        ("div", float("nan"), "div must be a positive number"),
        ("div_final", 0.0, "div_final must be a positive number"),
        ("bias_lr_factor", -1.0, "bias_lr_factor must be a positive number"),
        ("lookahead_steps", -1, "lookahead_steps must be zero"),
        ("whiten_bias_epochs", -1, "whiten_bias_epochs must be zero"),
        ("label_smoothing", 1.0, "label_smoothing must be at least 0 and less than 1"),
        ("moms", (0.9, 0.8), "moms must be three numbers"),
        ("moms", (0.9, 0.8, 1.0), "moms must be three numbers"),
        ("name", "../elsewhere", "name must be up to 100 letters"),
    ],
)
def test_values_out_of_range(field, value, words):
    with pytest.raises(UserError, match=words):
        get_recipe("fast", **{field: value})


def test_misspellings_get_a_hint():
    with pytest.raises(UserError, match="Did you mean 'classic-adam'"):
        get_recipe("clasic-adam")
    with pytest.raises(UserError, match="Did you mean 'epochs'"):
        get_recipe("fast", epoch=3)


# --- recipes as files --------------------------------------------------------------------------------------------

AWKWARD = Recipe(
    name="awkward",
    about='"quoted"\\ and \ttabs,\nlines, \x7f, \x00, umlauts äöü and 🦔',
    lr=1e-05,
    wd=0.1 + 0.2,
    div_final=1e300,
    moms=(0.9, 1 / 3, 0.0),
    trivial_augment=True,
)


@pytest.fixture
def recipe_file(tmp_path):
    """Writes a recipe file and returns its path."""

    def write(text, name="my.toml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize("recipe", [*RECIPES.values(), AWKWARD], ids=lambda recipe: recipe.name)
def test_a_file_gives_the_same_recipe_again(recipe, recipe_file):
    path = recipe_file(recipe_toml(recipe))
    assert get_recipe(path) == get_recipe(str(path)) == recipe
    assert recipe_toml(get_recipe(path)) == recipe_toml(recipe)


def test_a_file_changes_what_it_names_and_inherits_the_rest(recipe_file):
    recipe_file('base = "fast"\nlr = 2\nmoms = [0.9, 0.8, 0]\n', "bases/mild.toml")
    heir = get_recipe(recipe_file('base = "bases/mild.toml"\nabout = "mine"\nwhiten = false\n'), epochs=5)
    changed = {"lr": 2.0, "moms": (0.9, 0.8, 0.0), "whiten": False, "epochs": 5}
    assert heir == dataclasses.replace(RECIPES["fast"], name="my", about="mine", measured="", **changed)
    assert type(heir.lr) is float and all(type(momentum) is float for momentum in heir.moms)


def test_a_file_without_a_base_starts_from_the_defaults(recipe_file):
    assert get_recipe(recipe_file("\ufeff# a mark and a comment\nbs = 64\n")) == Recipe(name="my", bs=64)
    assert get_recipe(recipe_file('name = "yours"')).name == "yours"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr = 0.1\nwd 0.2\n", "my.toml is not TOML: .*line 2"),
        ("lr = fast", "my.toml is not TOML: .*line 1, column 6.*text in quotes"),
        ("a = " + "[" * 5000, "my.toml is not TOML"),
        (b'about = "\xff"', r"my.toml is not UTF-8 text \(byte 10\)"),
        ("learning = 1", "no field 'learning'"),
        ("valid-pct = 0.1", "no field 'valid-pct'. Did you mean 'valid_pct'"),
        ("[fast]\nlr = 1", "no field 'fast'"),
        ('lr = "high"', "my.toml: lr must be a number, not 'high'"),
        ("lr = true", "lr must be a number, not True"),
        ("lr = inf", "lr must be a positive number"),
        ("lr = 1" + "0" * 400, "lr must be a number"),
        ("epochs = 3.0", "epochs must be a whole number, not 3.0"),
        ("epochs = true", "epochs must be a whole number, not True"),
        ("epochs = 0", "my.toml: epochs must be at least 1"),
        ("whiten = 1", "whiten must be true or false, not 1"),
        ("model = 3", "model must be text in quotes, not 3"),
        ("moms = 0.9", "moms must be three numbers in brackets, not 0.9"),
        ("moms = [0.9, 0.8]", "moms must be three numbers"),
        ('moms = [0.9, "0.8", 0.7]', "moms must be three numbers in brackets"),
        ("base = 3", "base must be the name of a recipe or a file"),
        ('base = "fsat"', "my.toml: There is no recipe 'fsat'. Did you mean 'fast'"),
        ('base = "other.toml"', "my.toml: .*other.toml cannot be read: No such file"),
        ('base = "my.toml"', "my.toml: its base leads back to itself"),
        ('name = "a b"', "my.toml: name must be up to 100 letters"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "bytes",
)
def test_wrong_files(recipe_file, text, words):
    with pytest.raises(UserError, match=words):
        get_recipe(recipe_file(text))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.toml cannot be read: No such file"):
        get_recipe(str(tmp_path / "nowhere.toml"))
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        get_recipe(tmp_path)


def test_bases_in_a_circle_are_refused(recipe_file, tmp_path):
    recipe_file('base = "b.toml"', "a.toml")
    recipe_file('base = "sub/../a.toml"', "b.toml")
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match=r"a.toml: .*b.toml: .*a.toml: its base leads back to itself"):
        get_recipe(tmp_path / "a.toml")


def test_every_run_keeps_its_recipe(digits_run):
    fields = json.loads((digits_run.folder / "config.json").read_text())["recipe"]
    recipe = get_recipe(digits_run.folder / "recipe.toml")
    assert recipe == Recipe(**{**fields, "moms": tuple(fields["moms"])}) == get_recipe("classic-sgd", epochs=8, bs=64)


def test_training_by_a_file(recipe_file, tmp_path):
    """The file's own length and size count; options come before it; a fault in it is named before anything starts."""
    recipe_file('base = "classic-adam"\nepochs = 2\nsize = 36\nbs = 32\n')
    done = call("train.py", "--data", "digits", "--subset", "200", "--recipe", "my.toml", "--bs", "64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^epoch 2/2 ", done.stdout, flags=re.M)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-my-digits")
    assert get_recipe(folder / "recipe.toml") == get_recipe(tmp_path / "my.toml", bs=64)

    shown = call_here("data", "--data", "digits", "--show", "my.toml", cwd=tmp_path)
    assert shown.stdout == "augmentation-my.png\n", shown.stderr
    recipe_file("epoch = 2")
    refused = call_here("train", "--data", "digits", "--recipe", "my.toml", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "error: my.toml: A recipe has no field 'epoch'. Did you mean 'epochs'?\n"


def test_a_run_by_a_file_is_resumed_by_its_own_recipe(recipe_file, tmp_path, monkeypatch, capsys):
    """The file may be gone; one that is named again must say the same, but for what stands before it as options."""
    monkeypatch.chdir(tmp_path)
    recipe_file('base = "classic-adam"\nepochs = 1\nbs = 32\n')
    given = ["--recipe", "my.toml", "--bs", "50"]
    assert main("train", ["--data", "digits", "--subset", "100", *given]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    trained_by = (folder / "recipe.toml").read_bytes()
    for name in ("metrics.json", "recipe.toml"):
        (folder / name).unlink()

    recipe_file('base = "classic-adam"\nepochs = 1\nbs = 32\nmoms = [0.9, 0.8, 0.9]\nabout = "other words"\n')
    assert main("train", ["--resume", str(folder), *given]) == 2
    words = "--recipe my.toml with moms (0.9, 0.8, 0.9) where the run has (0.95, 0.85, 0.95)."
    assert capsys.readouterr().err == f"error: {folder} goes on as it began. Leave out: {words}\n"

    recipe_file('base = "classic-adam"\nepochs = 1\n')
    assert main("train", ["--resume", str(folder), *given]) == 0
    assert (folder / "recipe.toml").read_bytes() == trained_by
    (tmp_path / "my.toml").unlink()
    assert main("train", ["--resume", str(folder)]) == 0
    assert "is finished" in capsys.readouterr().out


def test_files_that_would_take_long(tmp_path):
    """A pipe, a device, a megabyte of brackets, numbers without end, bases of bases: refused at once, in one line."""
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "device.toml").symlink_to("/dev/zero")
    (tmp_path / "long.toml").write_text("lr = " + "[" * 1_000_000)
    (tmp_path / "nested.toml").write_text("lr = " + "[" * 50_000)
    (tmp_path / "digits.toml").write_text("epochs = 1" + "0" * 4000)
    (tmp_path / "digits2.toml").write_text("epochs = 1" + "0" * 5000)
    (tmp_path / "word.toml").write_text(f'optimizer = "{"z" * 90_000}"')
    (tmp_path / "field.toml").write_text(f"{'z' * 90_000} = 1")
    (tmp_path / "0.toml").write_text('base = "cpu"\n')
    for number in range(1, 3000):
        (tmp_path / f"{number}.toml").write_text(f'base = "{number - 1}.toml"\n')
    assert get_recipe(tmp_path / "9.toml").bs == RECIPES["cpu"].bs
    before = time.process_time()
    for name, words in (
        ("pipe", "it is no regular file"),
        ("device", "it is no regular file"),
        ("long", "it is longer than 100 kB"),
        ("nested", "is not TOML"),
        ("digits", "epochs must be a whole number up to 1,000,000,000"),
        ("digits2", "is not TOML"),
        ("word", "optimizer must be text of up to 4,096 characters"),
        ("field", "A recipe has no field"),
        ("2999", "of more than 10 recipes"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            get_recipe(tmp_path / f"{name}.toml")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 12 * (len(str(tmp_path)) + 20) + 300
    assert time.process_time() - before < 5
