"""The direction of imports, and what importing costs."""

import ast
import sys

import pytest
from helpers.commands import ROOT, call

PACKAGE = ROOT / "cifar_fastai"

# A module imports only modules that stand before it.
ORDER = (
    "errors terminal compat scratch labels tomlfiles recipes imagebounds images download folders sources cache models "
    "pretrained imageops augment corruptions data distributed convolutions muon learner checkpoints interrupts "
    "resuming training tracking figures contactsheet metrics explain evaluation manifest schema artifacts inference "
    "batching explainer prediction onnx_export report guards api uploads fragments page server web runfolder run "
    "robustness finished compare lrfinder tuning auto cli"
).split()


def imports_of(module: str) -> set[str]:
    """Top-level names and cifar_fastai's modules that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            if node.module == "cifar_fastai":
                found |= {f"cifar_fastai.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return {".".join(name.split(".")[:2]) if name.startswith("cifar_fastai") else name.split(".")[0] for name in found}


def test_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert modules == set(ORDER)


def test_imports_point_one_way():
    for place, module in enumerate(ORDER):
        ours = {name.removeprefix("cifar_fastai.") for name in imports_of(module) if name.startswith("cifar_fastai.")}
        assert ours <= set(ORDER[:place]), f"{module} imports {sorted(ours - set(ORDER[:place]))}"


def test_models_and_image_operations_need_torch_alone():
    assert imports_of("models") <= {"torch", "functools"} and imports_of("imageops") == {"torch"}


def test_recipes_need_the_standard_library_alone():
    ours = {"cifar_fastai.errors", "cifar_fastai.tomlfiles"}
    assert imports_of("recipes") <= {*ours, *sys.stdlib_module_names}
    assert imports_of("tomlfiles") <= {"cifar_fastai.errors", "tomli", *sys.stdlib_module_names}  # tomli: before 3.11


@pytest.mark.parametrize("arguments", ["'train', ['--help']", "None, ['compare', '--help']"])
def test_help_imports_nothing_heavy(tmp_path, arguments):
    code = (
        "import sys, cifar_fastai; from cifar_fastai.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'fastai', 'gradio', 'numpy', 'PIL', 'matplotlib', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = call("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout


def test_prediction_imports_no_fastai_and_training_no_torchvision(tmp_path):
    code = (
        "import sys, cifar_fastai.inference\n"
        "heavy = {'fastai', 'gradio', 'torchvision', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import cifar_fastai.run\n"
        "heavy = {'gradio', 'torchvision', 'timm', 'captum', 'optuna'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = call("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_public_names():
    import cifar_fastai

    for name in cifar_fastai.__all__:
        assert getattr(cifar_fastai, name).__doc__, f"{name} has no docstring"
    assert not hasattr(cifar_fastai, "no_such_name")
