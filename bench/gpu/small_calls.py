"""A forward and a backward of every op, for tools that look at kernels: python -m bench.gpu.small_calls [--large]."""

import sys
from collections.abc import Callable, Iterator

import torch

import kdkernels
from kdkernels.ops._cases import cases_of, registry
from kdkernels.testing.selftest import results_of

LARGEST = 5000  # largest number of elements in a small sample: a sanitizer makes a kernel a thousand times slower


def calls(large: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield every small accuracy case, or one row of each op that fills a GPU."""
    for name, op in registry().items():
        if large and op.gpu_benchmarks:
            one = op.gpu_benchmarks[0].workload
            tensors = one.make("cuda")
            yield one.name, lambda one=one, tensors=tensors: results_of(one.ours, tensors, (0,))
        for case in () if large else cases_of(name, torch.float32, "cuda"):
            sample = case.samples[0]
            if max(t.numel() for t in sample) <= LARGEST:
                yield (
                    f"{name}, {case.name}",
                    lambda case=case, sample=sample: results_of(case.function, sample, case.differentiable),
                )


def main() -> None:
    with kdkernels.set_backend("native"):
        for name, call in calls("--large" in sys.argv):
            call()
            torch.cuda.synchronize()
            print(f"done: {name}", flush=True)


if __name__ == "__main__":
    main()
