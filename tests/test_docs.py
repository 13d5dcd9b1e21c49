"""What the documentation shows is carried out: its Python code, its recipe files, its commands."""

import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import pytest
from helpers.commands import ROOT, call, environment, free_port
from PIL import Image

from cifar_fastai import Classifier, get_recipe
from cifar_fastai.cli import _parser

GUIDE = ROOT / "docs" / "your-own-images.md"
PAGES = (ROOT / "README.md", GUIDE, ROOT / "CONTRIBUTING.md")
STARTS = ("python train.py", "python predict.py", "python app.py", "python -m cifar_fastai", "cifar-fastai")


def blocks(page) -> list[str]:
    """The indented blocks of a page, without their indentation."""
    found = re.findall(r"(?<=\n\n)(?:    .*\n|\n(?=    ))+", page.read_text())
    return [re.sub(r"^    ", "", block, flags=re.M) for block in found]


def is_python(block: str) -> bool:
    return re.match(r"(from \S+ )?import [^{]", block) is not None


def commands(page) -> list[list[str]]:
    """The words of every command of ours on a page, in a block or between backquotes."""
    lines = [line.partition("  #")[0] for block in blocks(page) for line in re.split(r"\n| && ", block)]
    inline = [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", page.read_text())]
    return [shlex.split(line) for line in (*lines, *inline) if line.startswith(STARTS)]


PYTHON = [(page.name, block) for page in PAGES for block in blocks(page) if is_python(block)]


def test_there_is_something_to_carry_out():
    assert [len([name for name, _ in PYTHON if name == page.name]) for page in PAGES] == [4, 2, 0]
    assert len(commands(PAGES[0])) > 10 and len(commands(GUIDE)) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_can_be_given(page):
    for words in commands(page):
        scripts = {"train.py": "train", "predict.py": "predict", "app.py": "serve"}
        rest = words[1:] if words[0] == "cifar-fastai" else words[3:] if words[1] == "-m" else words[2:]
        if rest:
            _parser(scripts.get(words[1])).parse_args(rest)  # ends the test with a wrong one


@pytest.fixture
def address(tmp_path):
    """The export of the repository, served by app.py, which finds it beside itself."""
    port = free_port()
    command = [sys.executable, ROOT / "app.py", "--port", str(port)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment())
    assert any("serving" in line for line in process.stdout)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=30)


def run(code: str) -> dict:
    variables = {}
    exec(compile(code, "<documentation>", "exec"), variables)
    return variables


def test_the_readmes_python_trains_loads_and_predicts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "exports", tmp_path / "exports")
    Image.linear_gradient("L").save("photo.png")
    (code,) = (code for _, code in PYTHON if "create_learner" in code)
    assert code.count("epochs=10") == 1
    learn = run(code.replace("epochs=10", "epochs=1"))["learn"]
    label, index, probabilities = learn.predict("photo.png")
    expected = Classifier(ROOT / "exports" / "cifar10").predict("photo.png")
    assert label == next(iter(expected)) and float(probabilities[index]) == pytest.approx(expected[label], abs=1e-5)


def test_the_readmes_clients_get_answers(address, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("cat.jpg", "dog.png"):
        Image.linear_gradient("L").save(name)
    clients = [code for _, code in PYTHON if "127.0.0.1:7860" in code]
    for code in clients:
        run(code.replace("http://127.0.0.1:7860", address))
    label = next(iter(Classifier(ROOT / "exports" / "cifar10").predict("cat.jpg")))
    assert len(clients) == 2 and capsys.readouterr().out.count(f"'label': '{label}'") >= 2


# --- the guide ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """A folder in which the guide's Python code was run."""
    cwd = tmp_path_factory.mktemp("guide")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        for name, code in PYTHON:
            if name == GUIDE.name:
                run(code)
    return cwd


@pytest.mark.slow
def test_the_guides_five_commands_lead_to_a_served_model(guided):
    """As they stand there, but for the length of the training and the port."""
    (block,) = (block for block in blocks(GUIDE) if block.startswith("pip install ."))
    lines = [shlex.split(line.partition("  #")[0]) for line in block.splitlines()]
    assert [line[:2] for line in lines[1:]] == [["cifar-fastai", name] for name in ("data", "train", "predict", "serve")]
    _, show, train, predict, serve = lines
    train[train.index("--epochs") + 1] = "1"
    done = SimpleNamespace(**{line[1]: call("-m", "cifar_fastai", *line[1:], cwd=guided) for line in (show, train, predict)})
    for name, answer in vars(done).items():
        assert answer.returncode == 0, f"{name}: {answer.stderr}"
    assert (guided / done.data.stdout.strip()).suffix == ".png"
    n_images = sum("/" in line for line in done.predict.stdout.splitlines())
    assert n_images == len(list((guided / "crops" / "test" / "flower").iterdir())) == 60
    assert "540 training, 60 validation, 120 test images of 2 classes" in done.train.stdout

    port = str(free_port())
    command = [sys.executable, "-m", "cifar_fastai", *serve[1:], "--port", port]
    process = subprocess.Popen(command, cwd=guided, stdout=subprocess.PIPE, text=True, env=environment())
    assert any("serving" in line for line in process.stdout)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/model", timeout=30) as answer:
        assert b'"temple"' in answer.read()
    process.terminate()
    process.wait(timeout=30)


def test_the_guides_recipe_and_its_digits_are_as_told(guided):
    texts = [block for page in PAGES for block in blocks(page) if block.startswith("base = ")]
    assert len(texts) == 2
    for number, text in enumerate(texts):
        (guided / f"recipe-{number}.toml").write_text(text)
        recipe = get_recipe(guided / f"recipe-{number}.toml")
    assert (recipe.flip, recipe.bs, recipe.epochs, recipe.rotate) == ("off", 64, 10, get_recipe("classic-sgd").rotate)
    assert len(list((guided / "numbers" / "train").glob("?/*.png"))) == 1797
