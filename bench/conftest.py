"""pytest-benchmark on the same rows: pytest bench --benchmark-group-by=param:workload."""

import torch


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    torch.set_num_threads(2)
