"""An export as one ONNX file, which answers without torch and without this package."""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cifar_fastai.artifacts import Export, load_export, normalize
from cifar_fastai.errors import ExportError, UserError
from cifar_fastai.manifest import CONFIG, ONNX, WEIGHTS, add_file

CHECK_IMAGES, CHECK_SEED, CHECK_LIMIT = 1000, 0, 1e-5


def require_packages() -> None:
    """Raise UserError if what writes and checks ONNX files is not installed."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"ONNX needs the package {error.name!r}: `pip install onnxruntime onnxscript`.") from None


def write_onnx(folder: Path, expect_digest: str | None = None) -> tuple[Path, float, str]:
    """Add model.onnx to the export in `folder`; returns its path, by how much its probabilities differ from torch's, and
    the new digest of the export.

    Input `images`: uint8 (N, 3, size, size), RGB, 0 to 255, any N. Output `probabilities`: float32 (N, classes), calibrated
    as the Classifier's. The file's metadata name the classes, the size and the sha256 of the files it was made from.
    expect_digest: as for `load_export`. Raises UserError without the packages it takes, and ExportError if the export is
    damaged or if ONNX Runtime's probabilities for 1,000 images differ from torch's by more than 1e-5; then nothing is
    written.
    """
    require_packages()
    export = load_export(folder, expect_digest)
    data = _to_onnx(export)
    difference = _difference(export, data)
    if not difference <= CHECK_LIMIT:
        raise ExportError(f"{folder}: as ONNX it gives other probabilities, by up to {difference:.1e}; nothing was written.")
    return folder / ONNX, difference, add_file(export.sealed, ONNX, data)


class _Answering(nn.Module):
    """From pixels to calibrated probabilities."""

    def __init__(self, export: Export):
        super().__init__()
        self.export, self.network = export, export.model

    def forward(self, images: Tensor) -> Tensor:
        config = self.export.config
        return (self.network(normalize(images, config["mean"], config["std"])) / config["temperature"]).softmax(dim=1)


def _to_onnx(export: Export) -> bytes:
    example = torch.zeros(2, 3, export.size, export.size, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Answering(export).eval(), (example,), dynamo=True, external_data=False, verbose=False,
            input_names=["images"], output_names=["probabilities"], dynamic_shapes={"images": {0: torch.export.Dim("n")}},
        )  # fmt: skip
    files = export.sealed.files
    metadata = {
        "name": export.config["name"],
        "classes": json.dumps(export.classes, ensure_ascii=False),
        "size": str(export.size),
        "images": "uint8, N x 3 x size x size, RGB, 0 to 255",
        "weights_sha256": files[WEIGHTS]["sha256"],
        "config_sha256": files[CONFIG]["sha256"],
    }
    program.model.metadata_props.update(metadata)
    return program.model_proto.SerializeToString()


def check_images(size: int) -> Tensor:
    """Generated uint8 images (1000, 3, size, size), from flat ones over smooth ones to noise."""
    random, kinds = np.random.default_rng(CHECK_SEED), (1, 2, 4, 8, size)
    smooth = []
    for side in kinds:
        coarse = torch.from_numpy(random.random((CHECK_IMAGES // len(kinds), 3, side, side), dtype=np.float32))
        smooth.append(nn.functional.interpolate(coarse, size=(size, size), mode="bilinear"))
    return (torch.cat(smooth) * 255).round().to(torch.uint8)


def _difference(export: Export, data: bytes) -> float:
    """The most by which ONNX Runtime's probabilities differ from torch's over `check_images`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    differences = []
    for batch in check_images(export.size).split(100):
        (probabilities,) = session.run(["probabilities"], {"images": batch.numpy()})
        differences.append(np.abs(probabilities - export.probabilities(batch).numpy()).max())
    return float(np.max(differences))
