"""Muon: stochastic gradient descent whose steps for convolution filters are orthogonal matrices.

Keller Jordan, https://kellerjordan.github.io/posts/muon, and with convolutions and normalised filters his airbench94_muon.
torch.optim.Muon is for matrices alone, and computes in bfloat16, which most CPUs emulate; this one does so under autocast.
"""

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # lifts small singular values fast, and leaves all of them at about 0.7 to 1.2


class Muon(torch.optim.SGD):
    """SGD with Nesterov momentum, but a convolution's filters (N, C, h, w) are taken for a matrix of N rows.

    Their step is the gradient with momentum made orthogonal, times lr; and before it they are scaled to the norm √N, which
    suits networks that normalise what a convolution gives. Weight decay has no part in that.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """As SGD's, but without a closure. It uses up the filters' gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                if is_filter(weight) and weight.grad is not None:
                    self._step(weight, group["lr"], group["momentum"])
                    weight.grad = None  # for SGD to leave it alone
        return super().step()

    def _step(self, weight: Tensor, lr: float, momentum: float) -> None:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        buffer = state["momentum_buffer"].mul_(momentum).add_(weight.grad)
        gradient = weight.grad.add(buffer, alpha=momentum).permute(0, 2, 3, 1)  # as channels-last filters lie in memory
        direction = orthogonal(gradient.flatten(1)).view_as(gradient).permute(0, 3, 1, 2)
        weight.mul_(len(weight) ** 0.5 / weight.norm())
        weight.sub_(direction, alpha=lr)


def is_filter(weight: Tensor) -> bool:
    """Whether a weight is a convolution's filters."""
    return weight.ndim == 4


def orthogonal(matrix: Tensor, steps: int = 3) -> Tensor:
    """About the nearest matrix to `matrix` (N, M) with singular values of 1, by Newton and Schulz's iteration.

    The iteration multiplies from the left by a polynomial in the product of the matrix with its transpose; all of them are
    worked out on that small product, and multiplied onto the matrix at the end.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonal(matrix.T, steps).T
    a, b, c = QUINTIC
    norm = matrix.norm() + 1e-7
    gram = matrix @ matrix.T / norm**2
    product = identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(steps):
        factor = a * identity + b * gram + c * (gram @ gram)
        gram = factor @ gram @ factor
        product = factor @ product
    return product / norm @ matrix
