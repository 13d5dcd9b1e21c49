"""Lets torchvision import beside a torch built without CUDA. Import this module before torchvision.

The torchvision wheels on PyPI are compiled against a CUDA build of torch. Beside a CPU-only torch their compiled
operators cannot load, and `import torchvision` dies with "operator torchvision::nms does not exist": it attaches
Python code to two operators that were never declared. Declaring the two schemas is enough for everything that
needs no compiled operator (datasets, transforms, models).
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared = []  # keeps the torch.library.Library alive: its schemas go when it goes


def _real_operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return True  # no torchvision, nothing to repair
    for library in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return True
    return False


def declare_torchvision_operators() -> bool:
    """Declare `torchvision::nms` and `qnms` if the real ones cannot be had; True if that was needed."""
    if not _declared and not _real_operators_load():
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _declared.append(library)
    return bool(_declared)


declare_torchvision_operators()
