"""Where in a picture the evidence for a class lies: Grad-CAM."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRENGTH = 0.55  # of the colours over the picture


def grad_cam(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """Heat maps (N, H, W) between 0 and 1 for a normalised batch (N, 3, H, W): what spoke for class number classes[i].

    All 0 where nothing did. They are as coarse as the network's last feature maps, and a hint rather than a proof: R.
    Selvaraju et al., https://arxiv.org/abs/1610.02391. Of the networks' layers this one's maps keep most confidence when
    only their hottest pixels are shown.
    """
    from captum.attr import LayerGradCam

    with torch.enable_grad():
        maps = LayerGradCam(model.eval(), model.last_maps).attribute(x, classes, relu_attributions=True).detach()
    maps = F.interpolate(maps, size=x.shape[-2:], mode="bilinear")[:, 0]
    highest = maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(highest > 0, maps / highest, 0)


def overlay(images: np.ndarray, heat: Tensor) -> np.ndarray:
    """Heat maps (N, h, w) laid in colour over uint8 images (N, H, W, 3), which turn gray so that all colour is heat."""
    from matplotlib import colormaps

    heat = F.interpolate(heat[:, None].float(), size=images.shape[1:3], mode="bilinear")[:, 0].numpy()
    gray = (images @ np.array([0.299, 0.587, 0.114]))[..., None]
    colours = colormaps["inferno"](heat)[..., :3] * 255
    return ((1 - STRENGTH) * gray + STRENGTH * colours).round().astype(np.uint8)
