"""How the launches of the CUDA kernels divide the work; test_cuda_kernels.py runs this."""

import pytest
from cuda_host.plans import BIG, check_launch


@pytest.mark.parametrize("backward", [0, 1])
@pytest.mark.parametrize("contiguous", ["classes", "positions"])
@pytest.mark.parametrize(("positions", "classes"), [(BIG, 10), (BIG, 500), (2**20, 2**31 + 7), (1, 1), (7, 40000)])
def test_launches_cover_the_work_within_the_limits_of_a_gpu(positions, classes, contiguous, backward):
    strides = (1, classes) if contiguous == "classes" else (positions, 1)
    check_launch("softmax_plan", (positions, classes, *strides, backward), positions)
