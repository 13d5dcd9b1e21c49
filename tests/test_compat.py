from helpers.commands import call


def test_torchvision_and_all_of_fastai_vision_import_after_it(tmp_path):
    code = (
        "import cifar_fastai.compat\n"
        "import fastai.vision.all\n"
        "import torch, torchvision\n"
        "print(torchvision.models.resnet18()(torch.zeros(1, 3, 64, 64)).shape)"
    )
    done = call("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 1000])" in done.stdout


def test_a_public_name_is_enough(tmp_path):
    done = call("-c", "from cifar_fastai import dataloaders\nimport torchvision", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_it_declares_operators_only_where_importing_fails_without_them(tmp_path):
    bare = call("-c", "import torchvision", cwd=tmp_path)
    repaired = call("-c", "from cifar_fastai import compat; print(compat.declare_torchvision_operators())", cwd=tmp_path)
    assert repaired.stdout.strip() == str(bare.returncode != 0)
