"""How the launches of the CUDA kernels divide the work; test_cuda_kernels.py runs this."""

import pytest
from cuda_host.plans import BIG, check_launch


@pytest.mark.parametrize(
    ("images", "rows", "length"), [(BIG, 9, 9), (1, BIG, 5), (1, 5, BIG), (1, 1, 1), (64, 224, 224)]
)
def test_launches_cover_the_work_within_the_limits_of_a_gpu(images, rows, length):
    check_launch("image_plan", (images, 3, rows, length), rows)
