"""Benchmarks of softmax_divergence."""

import pytest
from workloads import runnable

from kdkernels.cases import softmax_divergence as cases

WORKLOADS = list(cases.workloads())


@pytest.mark.parametrize("implementation", ["kdkernels", "eager", "compile"])
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_forward_and_backward(benchmark, workload, implementation):
    benchmark.pedantic(runnable(workload)[implementation], warmup_rounds=5, rounds=20)
