"""Empty inputs of the Triton kernels, in Triton's interpreter."""

import torch

from kdkernels.functional import gradient_reversal
from kdkernels.testing.selftest import results_of


def test_empty_inputs():
    images = torch.randn(0, 3, 4, 4)
    assert results_of(gradient_reversal, (images,), (0,))[1].shape == images.shape
