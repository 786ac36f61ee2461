"""Total variation, and the image priors of DeepInversion."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops._triton_launch import bits_of, device_of, power_of_two
from kdkernels.ops.total_variation import triton_kernels as kernels

TILE = 2048
PRIOR_SUMS = 9  # |d| and d^2 of four directions, and the squares of the pixels


@dataclass(frozen=True)
class _Images:
    """Images as planes of gapless rows in memory, of one channel or of the pixels of all channels."""

    shape: tuple[int, int, int, int]
    step: int  # distance from a number to its neighbour in the next pixel
    strides: tuple[int, int, int]  # strides of images, planes and rows

    @property
    def planes(self) -> int:
        return self.shape[1] if self.step == 1 else 1

    @property
    def length(self) -> int:
        """Return the number of numbers in a row."""
        return self.shape[3] * self.step

    @property
    def tile(self) -> tuple[int, int]:
        """Return how many rows, and how many numbers of each, a program takes."""
        numbers = power_of_two(self.length, 16, 256)
        return power_of_two(self.shape[2], 1, TILE // numbers), numbers

    @property
    def blocks(self) -> tuple[int, int]:
        """Return how many tiles a plane has, down and across."""
        return triton.cdiv(self.shape[2], self.tile[0]), triton.cdiv(self.length, self.tile[1])

    @property
    def grid(self) -> tuple[int, int]:
        return self.shape[0] * self.planes, self.blocks[0] * self.blocks[1]

    def arguments(self) -> tuple[int, ...]:
        """Return the sizes that the kernels take."""
        batch, channels, rows, columns = self.shape
        return batch, channels, rows, columns, self.planes, self.step


def _images_of(image: Tensor) -> _Images | None:
    """Describe the memory layout of images; None if no description fits."""
    batch, channels, rows, width = image.shape
    strides = image.stride()
    of_planes = strides[0], strides[1], strides[2]
    if channels > 1 and strides[1] == 1 and (width == 1 or strides[3] == channels):
        return _Images((batch, channels, rows, width), channels, (strides[0], 0, strides[2]))
    if width == 1 or strides[3] == 1:
        return _Images((batch, channels, rows, width), 1, of_planes)
    return None


def _readable(image: Tensor) -> tuple[Tensor, _Images]:
    """Return the images, copied if no description fits, and their description."""
    images = _images_of(image)
    if images is None:
        image = image.contiguous()
        images = _images_of(image)
    assert images is not None, "contiguous images have rows without gaps"
    return image, images


def _sums(
    image: Tensor, images: _Images, kind: str, directions: int, eps: float = 0.0, mean_of_pairs: bool = False
) -> Tensor:
    """Return the sums of each image, [sums, images], in fp64."""
    count = PRIOR_SUMS if kind == "priors" else 1
    parts = images.planes * images.grid[1]
    partial = image.new_empty(count, images.shape[0], parts, dtype=torch.float64)
    result = image.new_empty(count, images.shape[0], dtype=torch.float64)
    rows, numbers = images.tile
    kernels.sums_kernel[images.grid](
        partial, image, bits_of(eps), *images.arguments(), images.blocks[1], images.strides, KIND=kind,
        DIRECTIONS=directions, MEAN_OF_PAIRS=mean_of_pairs, ROWS=rows, NUMBERS=numbers, num_warps=4,
    )  # fmt: skip
    kernels.image_kernel[(count * images.shape[0],)](result, partial, parts, BLOCK=1024, num_warps=4)
    return result


def image_prior_losses(input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return TV_l1, TV_l2, L2, and the norms of the four differences over the batch and of each image."""
    dtype = compute_dtype(input)
    tv_l1, tv_l2, l2 = (input.new_empty((), dtype=dtype) for _ in range(3))
    norms = input.new_empty(4 + input.shape[0], dtype=dtype)
    if input.numel() == 0:
        return tv_l1.zero_(), tv_l2.zero_(), l2.zero_(), norms.zero_()
    image, images = _readable(input)
    with device_of(input):
        sums = _sums(image, images, "priors", 4)
        kernels.priors_kernel[(1,)](
            tv_l1, tv_l2, l2, norms, sums, *images.arguments()[:4], BLOCK=256, num_warps=4
        )  # fmt: skip
    return tv_l1, tv_l2, l2, norms


def total_variation(
    input: Tensor, norm_type: str, directions: int, eps: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """Return the loss, and for the l2 norm the norm of each image."""
    dtype = compute_dtype(input)
    loss = input.new_empty((input.shape[0],) if reduction == "none" else (), dtype=dtype)
    norms = input.new_empty(input.shape[0] if norm_type == "l2" else 0, dtype=dtype)
    if input.numel() == 0:
        return loss.zero_(), norms.zero_()
    image, images = _readable(input)
    averages_images = reduction == "mean" and norm_type in ("l2", "isotropic")
    with device_of(input):
        sums = _sums(image, images, norm_type, directions, eps, reduction == "mean" and not averages_images)
        kernels.variation_kernel[(1,)](
            loss, norms if norm_type == "l2" else None, sums, input.shape[0], input.shape[0] if averages_images else 1,
            ROOT=norm_type == "l2", BY_IMAGE=reduction == "none", BLOCK=256, num_warps=4,
        )  # fmt: skip
    return loss, norms


def _launch_gradient(
    image: Tensor, grads: tuple[Tensor | None, ...], norms: Tensor, kind: str, directions: int, eps: float,
    reduction: str,
) -> Tensor:  # fmt: skip
    """Return the gradient of the images in their memory layout."""
    result = torch.empty_like(image)
    if image.numel() == 0:
        return result
    output = result
    images, of_output = _images_of(image), _images_of(result)
    if images is None or of_output is None or images.step != of_output.step:
        image = image.contiguous()
        output = torch.empty_like(image)
        _, images = _readable(image)
        _, of_output = _readable(output)
    rows, numbers = images.tile
    dense = [None if g is None else g.contiguous() for g in grads]
    with device_of(image):
        kernels.gradient_kernel[images.grid](
            output, image, *dense, norms.contiguous(), bits_of(eps), *images.arguments(), images.blocks[1],
            of_output.strides, images.strides, KIND=kind, DIRECTIONS=directions, REDUCTION=reduction, ROWS=rows,
            NUMBERS=numbers, num_warps=8,
        )  # fmt: skip
    return result if output is result else result.copy_(output)


def image_prior_losses_backward(
    grad_l1: Tensor | None, grad_l2: Tensor | None, grad_norm: Tensor | None, input: Tensor, norms: Tensor
) -> Tensor:
    """Return the gradient of the image priors."""
    return _launch_gradient(input, (grad_l1, grad_l2, grad_norm), norms, "priors", 4, 0.0, "sum")


def total_variation_backward(
    grad_output: Tensor, input: Tensor, norms: Tensor, norm_type: str, directions: int, eps: float, reduction: str
) -> Tensor:
    """Return the gradient of the total variation."""
    return _launch_gradient(input, (grad_output, None, None), norms, norm_type, directions, eps, reduction)
