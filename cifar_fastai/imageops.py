"""What can be done to a batch of images once it is known by how much: no randomness here, and torch alone.

Images are tensors (N, 3, H, W) of values 0 to 255, uint8 or float; every amount is a tensor (N,), one for each image.
The geometry of an image is a 3 x 3 matrix, so that any number of changes multiply into one resampling.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

GRAY = (0.299, 0.587, 0.114)  # weights of red, green and blue in brightness (ITU-R 601-2)

# --- whole pixels ------------------------------------------------------------------------------------------------


def flip_and_shift(images: Tensor, flips: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Mirror `images` (N, C, H, W) where `flips`, then shift each by whole pixels, the border reflected."""
    n, channels, height, width = images.shape
    rows = _reflect(torch.arange(height, device=images.device) - down[:, None], height)
    columns = _reflect(torch.arange(width, device=images.device) - right[:, None], width)
    columns = torch.where(flips[:, None], width - 1 - columns, columns)
    places = (rows[:, :, None] * width + columns[:, None, :]).view(n, -1, 1).expand(-1, -1, channels)
    pixels = images.permute(0, 2, 3, 1).reshape(n, height * width, channels)
    return pixels.gather(1, places).view(n, height, width, channels).permute(0, 3, 1, 2)


def _reflect(index: Tensor, length: int) -> Tensor:
    """Indices beyond either end folded back, the border pixel not repeated."""
    return (length - 1) - ((length - 1) - index.abs()).abs()


def cutout(images: Tensor, top: Tensor, left: Tensor, size: int, fill: Tensor) -> Tensor:
    """A square of `size` pixels of each image painted over with the colour `fill` (3,).

    T. DeVries and G. Taylor, https://arxiv.org/abs/1708.04552.
    """
    return torch.where(_box(images, top, left, size, size), fill.to(images.dtype).view(1, 3, 1, 1), images)


def _box(images: Tensor, top: Tensor, left: Tensor, height, width) -> Tensor:
    """(N, 1, H, W), true inside each image's rectangle."""
    rows, columns = (torch.arange(length, device=images.device) for length in images.shape[-2:])
    rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])
    columns = (columns >= left[:, None]) & (columns < (left + width)[:, None])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


# --- any geometry ------------------------------------------------------------------------------------------------


def identities(n: int, device) -> Tensor:
    return torch.eye(3, device=device).repeat(n, 1, 1)


def mirror_matrices(flips: Tensor) -> Tensor:
    """(N, 3, 3) matrices that mirror left and right where `flips` (N,)."""
    matrices = identities(len(flips), flips.device)
    matrices[:, 0, 0] = 1 - 2 * flips.float()
    return matrices


def affine_matrices(angle: Tensor, zoom: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """The input coordinates of an image rotated by `angle` (radians, counter-clockwise), enlarged `zoom` times and
    then moved by `right` and `down` (in half sides). Each argument (N,); returns (N, 3, 3)."""
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    matrices = identities(len(angle), angle.device)
    matrices[:, 0, 0], matrices[:, 0, 1], matrices[:, 0, 2] = cos, -sin, -cos * right + sin * down
    matrices[:, 1, 0], matrices[:, 1, 1], matrices[:, 1, 2] = sin, cos, -sin * right - cos * down
    return matrices


def perspective_matrices(inwards: Tensor) -> Tensor:
    """The input coordinates of images whose corners were moved towards the centre.

    inwards: (N, 4, 2), how far each corner (top left, top right, bottom right, bottom left) moves along x and y,
    in half sides. Returns (N, 3, 3). Closed form for a square's image: P. Heckbert, Fundamentals of Texture Mapping
    and Image Warping, 1989, section 2.2.3.
    """
    signs = inwards.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    corners = signs * (1 - inwards)
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (corner.unbind(-1) for corner in corners.unbind(1))
    dx1, dx2, dx3 = x1 - x2, x3 - x2, x0 - x1 + x2 - x3
    dy1, dy2, dy3 = y1 - y2, y3 - y2, y0 - y1 + y2 - y3
    determinant = dx1 * dy2 - dx2 * dy1
    g, h = (dx3 * dy2 - dx2 * dy3) / determinant, (dx1 * dy3 - dx3 * dy1) / determinant
    rows = (x1 - x0 + g * x1, x3 - x0 + h * x3, x0, y1 - y0 + g * y1, y3 - y0 + h * y3, y0, g, h, torch.ones_like(g))
    from_unit_square = torch.stack(rows, dim=-1).view(-1, 3, 3)
    to_unit_square = inwards.new_tensor([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]])
    return torch.linalg.inv(from_unit_square @ to_unit_square)


def shear_matrices(along_x: Tensor, along_y: Tensor) -> Tensor:
    """(N, 3, 3) matrices that move each row by `along_x` times its distance from the upper edge, and each column by
    `along_y` times its distance from the left one."""
    matrices = identities(len(along_x), along_x.device)
    matrices[:, 0, 1] = matrices[:, 0, 2] = along_x
    matrices[:, 1, 0] = matrices[:, 1, 2] = along_y
    return matrices


def resample(images: Tensor, matrices: Tensor) -> Tensor:
    """Bilinear samples of `images` (N, C, H, W) where `matrices` (N, 3, 3) say, reflected at the border; float32."""
    n, _, height, width = images.shape
    y = (torch.arange(height, device=images.device) * 2 + 1) / height - 1
    x = (torch.arange(width, device=images.device) * 2 + 1) / width - 1
    y, x = torch.meshgrid(y, x, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(1, -1, 3)
    places = points @ matrices.transpose(1, 2)
    grid = (places[..., :2] / places[..., 2:]).view(n, height, width, 2)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)


# --- colour ------------------------------------------------------------------------------------------------------


def colour_jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Brightness, then contrast, then saturation, each by a factor an image (N,), as torchvision defines them.

    images: float (N, 3, H, W), values 0 to 255, and so the result.
    """
    brightness, contrast, saturation = (f.view(-1, 1, 1, 1) for f in (brightness, contrast, saturation))
    images = (images * brightness).clamp_(0, 255)
    images = torch.lerp(_gray(images).mean(dim=(2, 3), keepdim=True), images, contrast).clamp_(0, 255)
    return torch.lerp(_gray(images), images, saturation).clamp_(0, 255)


def _gray(images: Tensor) -> Tensor:
    return sum(weight * images[:, channel : channel + 1] for channel, weight in enumerate(GRAY))


def sharpen(images: Tensor, factor: Tensor) -> Tensor:
    """Float images blurred (factor 0) to sharpened (2), their outermost pixels left alone, as torchvision defines it."""
    kernel = images.new_ones(3, 1, 3, 3)
    kernel[:, :, 1, 1] = 5
    blurred = images.clone()
    blurred[..., 1:-1, 1:-1] = F.conv2d(images, kernel / 13, groups=3)
    return torch.lerp(blurred, images, factor.view(-1, 1, 1, 1)).clamp_(0, 255)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Each value with all but its highest `bits` bits at 0."""
    step = (2 ** (8 - bits)).view(-1, 1, 1, 1)
    return torch.floor(images.round() / step) * step


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Each value from `threshold` up inverted."""
    return torch.where(images >= threshold.view(-1, 1, 1, 1), 255 - images, images)


# --- two images --------------------------------------------------------------------------------------------------


def blend(images: Tensor, others: Tensor, share: Tensor) -> Tensor:
    """`share` of each image and 1 - share of the other."""
    return torch.lerp(others, images, share.view(-1, 1, 1, 1))


def paste(images: Tensor, others: Tensor, share: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A rectangle of each other image pasted over, around the place (y, x), each 0 to 1, and cut off at the border.

    It has the image's shape and before the cut 1 - share of its area; also returns the share that remains, (N,).
    """
    height, width = images.shape[-2:]
    side = torch.sqrt(1 - share)
    top, bottom = (((y + sign * side / 2) * height).round().clamp(0, height) for sign in (-1, 1))
    left, right = (((x + sign * side / 2) * width).round().clamp(0, width) for sign in (-1, 1))
    pasted = (bottom - top) * (right - left) / (height * width)
    return torch.where(_box(images, top, left, bottom - top, right - left), others, images), 1 - pasted
