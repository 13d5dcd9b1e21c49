"""The networks, and the registry that names them. Needs torch and nothing else.

Every model maps a float batch (N, 3, size, size), normalised, to logits (N, n_classes).
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

TTA_VIEWS = ("mirror", "shift")  # that test-time augmentation can take beside the image itself
Views = tuple[str, ...] | list[str]  # of these
ROUNDING = 1e-6  # share of a variance that is no more than what float32 rounds away


class TwoHalves(nn.Module):
    """A network of two halves: `maps` gives feature maps (N, D, h, w), which still tell where something is, and
    `classify` makes logits of them. `last_maps` is the layer whose maps Grad-CAM reads."""

    def forward(self, x):
        return self.classify(self.maps(x))


class ConvNet(TwoHalves):
    """The classic CNN: blocks of (conv, BN, ReLU) x 2, max-pool and dropout, then a fully connected head.

    widths: output channels of each block; a block halves height and width.
    dropout: of the blocks; head_dropout: of the hidden layer, which has `hidden` units.
    """

    def __init__(self, n_classes, size=32, widths=(32, 64, 128), hidden=256, dropout=0.2, head_dropout=0.4):
        super().__init__()
        blocks = zip((3, *widths[:-1]), widths, strict=True)
        self.features = nn.Sequential(*(self._block(n_in, n_out, dropout) for n_in, n_out in blocks))
        n_features = widths[-1] * (size >> len(widths)) ** 2
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(n_features, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(head_dropout),
            nn.Linear(hidden, n_classes),
        )

    @staticmethod
    def _block(n_in, n_out, dropout):
        return nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Dropout(dropout),
        )

    @property
    def last_maps(self) -> nn.Module:
        return self.features[-1]

    def maps(self, x):
        return self.features(x)

    def classify(self, maps):
        return self.head(maps)


class WhitenedNet(TwoHalves):
    """The networks of airbench94 and airbench96 (Keller Jordan, https://arxiv.org/abs/2404.00498).

    A 2 x 2 convolution that whitens its patches, then three groups of conv, max-pool, BN, GELU, conv, BN, GELU.
    BN scales are fixed at 1. Before training call `init_whitening` with training images, and `init_identity`.

    widths: output channels of the three groups. depth: convolutions a group; with 3, as in airbench96, those after the
    first have a shortcut around them. logit_scale: factor on the logits.
    """

    def __init__(self, n_classes, size=32, widths=(64, 256, 256), depth=2, logit_scale=1 / 9):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 2)  # 24: both signs of each of the 3 * 2 * 2 eigenvectors
        groups = zip((24, *widths[:-1]), widths, strict=True)
        self.groups = nn.Sequential(*(self._group(n_in, n_out, depth) for n_in, n_out in groups))
        self.head = nn.Linear(widths[-1], n_classes, bias=False)
        self.logit_scale = logit_scale

    @classmethod
    def _group(cls, n_in, n_out, depth):
        first = [cls._conv(n_in, n_out), nn.MaxPool2d(2), cls._norm(n_out), nn.GELU()]
        if depth == 2:
            return nn.Sequential(*first, cls._conv(n_out, n_out), cls._norm(n_out), nn.GELU())
        rest = [layer for _ in range(depth - 1) for layer in (cls._conv(n_out, n_out), cls._norm(n_out), nn.GELU())]
        return nn.Sequential(*first, Shortcut(*rest[:-1]), rest[-1])

    @staticmethod
    def _conv(n_in, n_out):
        return nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)

    @staticmethod
    def _norm(n):
        norm = Norm(n, eps=1e-12, momentum=0.4)
        norm.weight.requires_grad = False
        return norm

    @torch.no_grad()
    def init_whitening(self, images, eps=5e-4):
        """Set the stem's filters to the whitened eigenvectors of the 2 x 2 patches of `images` (N, 3, H, W), normalised,
        for good: they are not trained.

        Directions in which the images do not vary, such as colour in grey ones, would give channels of magnified rounding
        errors: the others take their places.
        """
        patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 12)
        covariance = patches.T @ patches / len(patches)
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
        filters = (eigenvectors / torch.sqrt(eigenvalues + eps)).T.reshape(12, 3, 2, 2)
        seen = eigenvalues > ROUNDING * eigenvalues.amax()
        if seen.any():
            filters = filters[seen][torch.arange(12, device=filters.device) % seen.sum()]
        self.stem.weight.copy_(torch.cat([filters, -filters]))
        self.stem.bias.zero_()
        self.stem.weight.requires_grad = False

    @torch.no_grad()
    def init_identity(self):
        """Let each 3 x 3 convolution start as the identity on as many channels as it has inputs."""
        for conv in self.groups.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.dirac_(conv.weight[: conv.in_channels])

    @property
    def last_maps(self) -> nn.Module:
        return self.groups[-1]

    def maps(self, x):
        with torch.autocast(x.device.type, enabled=False):  # whitening magnifies what bfloat16 rounds away
            x = self.stem(x)
        return self.groups(F.gelu(x))

    def classify(self, maps):
        return self.head(maps.amax(dim=(2, 3))) * self.logit_scale


class Norm(nn.BatchNorm2d):
    """BatchNorm with scales fixed at 1, for channels that may be constant: pictures without colour, or all of one colour.

    What is the same everywhere in a batch is divided by the root of `eps`, and so is its gradient, layer by layer, until it
    is infinite. Here such a channel has no gradient; all others have the one they have in BatchNorm2d.
    """

    def forward(self, x):
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        before, scales = self.running_var.clone(), torch.ones_like(self.weight)
        out = F.batch_norm(x, self.running_mean, self.running_var, scales, self.bias, True, self.momentum, self.eps)
        variance = (self.running_var - (1 - self.momentum) * before) / self.momentum  # of this batch
        scales.data.mul_(variance > ROUNDING * before.clamp(min=1))  # which the backward pass has yet to multiply by
        return out


class Shortcut(nn.Sequential):
    """The layers' output added to their input."""

    def forward(self, x):
        return x + super().forward(x)


MODELS: dict[str, type[nn.Module] | partial] = {
    "small": ConvNet,
    "base": WhitenedNet,
    "slim": partial(WhitenedNet, widths=(48, 160, 160), depth=3),
    "deep": partial(WhitenedNet, depth=3),
    "large": partial(WhitenedNet, widths=(128, 512, 512), depth=3),
}


def create_model(name: str, n_classes: int, size: int = 32) -> nn.Module:
    """The model called `name` in MODELS for images of `size` x `size` pixels, in channels-last memory format.

    Raises KeyError for an unknown name and ValueError for images too small for it.
    """
    if size < 16:
        raise ValueError(f"images of {size} x {size} pixels are too small; the models take 16 and more")
    model = MODELS[name](n_classes, size)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own types leave it out


def count_parameters(model: nn.Module) -> int:
    """Number of weights, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, size: int = 32) -> int:
    """Floating-point operations of the convolutions and matrix products for one image, a multiply-add counted as two."""
    training = model.training
    weight = next(model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size, device=weight.device))
    model.train(training)
    return counter.get_total_flops()


def misfit(found: dict, wanted: dict[str, torch.Tensor], may_lack: str = " ") -> str:
    """The first difference between tensors by name in words, in their names or shapes, or an empty string.

    may_lack: the end of names that may be missing.
    """
    for key, value in wanted.items():
        if key not in found and not key.endswith(may_lack):
            return f"{key} is missing"
        if key in found and not isinstance(found[key], torch.Tensor):
            return f"{key} is no tensor"
        if key in found and found[key].shape != value.shape:
            return f"{key} is {tuple(found[key].shape)} there, {tuple(value.shape)} in the model"
    strangers = sorted(map(repr, found.keys() - wanted.keys()))
    return f"the model has no {strangers[0][:100]}" if strangers else ""


def familiarity(maps: torch.Tensor) -> torch.Tensor:
    """How much of what a network was trained to see is in each image, (N,), from its last feature maps (N, D, h, w): the
    length of the vector of their maxima. Low for images unlike the training images.

    J. Park et al., Understanding the Feature Norm for Out-of-Distribution Detection, https://arxiv.org/abs/2310.05316.
    """
    return maps.amax(dim=(2, 3)).norm(dim=1)


def tta_logits(model, x: torch.Tensor, views: Views = TTA_VIEWS, plain: torch.Tensor | None = None) -> torch.Tensor:
    """Logits averaged over `n_views(views)` views of a normalised batch `x`: half from the image, half from the same after
    a shift by one pixel up and left, and down and right ("shift"), and each of these and its mirror image ("mirror"). With
    both they are the six of airbench94.

    plain: the logits of `x` itself, where they are known already.
    """

    def seen(images, logits=None):
        logits = model(images) if logits is None else logits
        return (logits + model(images.flip(-1))) / 2 if "mirror" in views else logits

    unshifted = seen(x, plain)
    if "shift" not in views:
        return unshifted
    height, width = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    shifted = (padded[..., i : i + height, i : i + width] for i in (0, 2))
    return unshifted / 2 + sum(seen(view) for view in shifted) / 4


def n_views(views: Views) -> int:
    """How many views of an image test-time augmentation averages over, the image itself included."""
    return (2 if "mirror" in views else 1) * (3 if "shift" in views else 1)
