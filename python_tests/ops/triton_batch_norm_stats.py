"""Distances of many layers by the Triton kernels, which take a limited number of layers per launch.

Run in Triton's interpreter by python_tests/gpu/triton_interpreter.py.
"""

import torch

import kdkernels
from kdkernels.functional import batch_norm_stat_distances
from kdkernels.testing.selftest import results_of


def test_many_layers_take_several_launches():
    channels = [3, 1, 2] * 15
    statistics = [torch.rand(sum(channels), dtype=torch.float64) + 0.5 for _ in range(4)]

    def distances(*statistics):
        return batch_norm_stat_distances(*statistics, channels)

    found = results_of(distances, tuple(statistics), (0, 1, 2, 3))
    with kdkernels.set_backend("reference"):
        expected = results_of(distances, tuple(statistics), (0, 1, 2, 3))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
