"""How the launches of the CUDA kernels divide the work; test_cuda_kernels.py runs this."""

import pytest
from cuda_host.plans import BIG, check_launch


@pytest.mark.parametrize("gradient", [0, 1])
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize(
    ("samples", "channels", "plane"), [(BIG, 3, 1), (4, 5, BIG), (1, BIG, 2), (1, 1, 1), (256, 64, 1024)]
)
def test_launches_cover_the_work_within_the_limits_of_a_gpu(samples, channels, plane, rows, gradient):
    needed = samples * (plane if rows else 1)
    check_launch("batch_norm_plan", (samples, channels, plane, rows, gradient), needed)
