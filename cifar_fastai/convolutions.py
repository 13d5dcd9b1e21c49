"""Convolutions in bfloat16 on a CPU: faster gradients of the filters where feature maps are small.

oneDNN works such a gradient out along the rows of the maps, while a CPU that multiplies tiles (AMX) wants 32 pixels at once.
The last groups of the networks have rows of 2 to 7 pixels, which leave most of a tile empty. Products of matrices over the
pixels of all images fill it; benchmarks/precision.py measures what that gains.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

NARROW = 8  # pixels; on maps of this width and more oneDNN's own way is as fast


class NarrowConvolutions(TorchFunctionMode):
    """Within it `filter_gradient` works out the filters' gradients of 3 x 3 convolutions on maps less than NARROW wide."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d and not kwargs and _is_narrow(*args):
            x, weight, *rest = args
            return _OwnFilterGradient.apply(torch.conv2d(x, weight.detach(), *rest), x.detach(), weight)
        return function(*args, **(kwargs or {}))


def _is_narrow(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> bool:
    kind = (tuple(weight.shape[2:]), bias, stride, padding, dilation, groups)
    return kind == ((3, 3), None, (1, 1), (1, 1), (1, 1), 1) and weight.requires_grad and x.shape[-1] < NARROW


class _OwnFilterGradient(torch.autograd.Function):
    """Hands a convolution's output on as it is, and gives `weight` the gradient that the convolution did not work out."""

    @staticmethod
    def forward(ctx, output, x, weight):
        ctx.save_for_backward(x)
        ctx.dtype = weight.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient, None, filter_gradient(x.to(gradient.dtype), gradient).to(ctx.dtype)


def filter_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Of a 3 x 3 convolution with a border of one zero, (n_out, n_in, 3, 3), from its input `x` (N, n_in, H, W) and the
    gradient of its output (N, n_out, H, W).

    Each row of the filters meets the same neighbourhoods of 1 x 3 pixels, from as many rows of pixels further down.
    """
    n, n_in, height, width = x.shape
    pixels = F.pad(x.permute(2, 0, 3, 1), (0, 0, 1, 1, 0, 0, 1, 1))  # (H + 2, N, W + 2, n_in)
    neighbourhoods = pixels.unfold(2, 3, 1).transpose(3, 4).reshape(height + 2, n * width, 3 * n_in)
    outputs = gradient.permute(1, 2, 0, 3).flatten(1)  # (n_out, H * N * W)
    rows = [outputs @ neighbourhoods[i : i + height].flatten(0, 1) for i in range(3)]
    return torch.stack(rows, 1).view(-1, 3, 3, n_in).permute(0, 3, 1, 2)
