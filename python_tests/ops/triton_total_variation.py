"""Empty inputs of the Triton kernels, in Triton's interpreter."""

import torch

from kdkernels.functional import image_prior_losses, total_variation
from kdkernels.testing.selftest import results_of


def test_empty_inputs():
    images = torch.randn(0, 3, 4, 4)
    assert [float(x) for x in results_of(image_prior_losses, (images,), (0,))[:3]] == [0, 0, 0]
    assert results_of(total_variation, (images,), (0,))[1].shape == images.shape
