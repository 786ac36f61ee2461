"""How the launches of the CUDA kernels divide the work; test_cuda_kernels.py runs this."""

import pytest
from cuda_host.plans import BIG, check_launch


@pytest.mark.parametrize("count", [BIG, 2**40, 1])
def test_launches_cover_the_work_within_the_limits_of_a_gpu(count):
    check_launch("scale_plan", (count,), count)
