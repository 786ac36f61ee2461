"""One side of a comparison: runs workloads on the kdkernels in PYTHONPATH, as requested by lines of JSON on stdin.

    python bench/compare/worker.py <threads>

This tree writes each workload to a file: the name of a public function, its options, its inputs and the incoming
gradients. Both sides load that file, so both run the same; the only module that the trees must share is
kdkernels.functional. A worker that waits for a line is idle, so that the other side has the machine to itself.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import kdkernels
from kdkernels import functional


def workloads() -> Iterable[Any]:
    """Return the workloads of this tree, which both sides run."""
    from kdkernels.ops import _cases

    return [row.workload for row in _cases.benchmarks() if row.compared]


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


class Loaded:
    """A workload from a file: a forward, and a backward for the gradient of its first tensor."""

    def __init__(self, path: Path) -> None:
        name, options, self.tensors, self.cotangents = torch.load(path, weights_only=True)
        self.function = partial(getattr(functional, name), **options)
        self.wanted = self.tensors[0].requires_grad_()

    def step(self) -> tuple[Tensor, ...]:
        outputs = as_tuple(self.function(*self.tensors))
        torch.autograd.backward(outputs, self.cotangents)
        return outputs

    def results(self) -> dict[str, Tensor]:
        self.wanted.grad = None
        outputs = {f"output {i}": output.detach() for i, output in enumerate(self.step())}
        return {**outputs, "gradient": self.wanted.grad}

    def seconds(self, calls: int) -> float:
        """Return the median of some calls, after one that meets the caches as the other side left them."""
        taken = []
        for _ in range(1 + calls):
            self.wanted.grad = None
            start = perf_counter()
            self.step()
            taken.append(perf_counter() - start)
        return median(taken[1:])


class Server:
    """Answers requests; holds the tensors of one workload at a time."""

    def __init__(self) -> None:
        self.loaded: Any = None

    def describe(self) -> dict[str, Any]:
        """Say which package is loaded, and whether its compiled kernels are."""
        return {
            "package": str(Path(kdkernels.__file__).resolve().parent),
            "compiled": "kdkernels._C" in sys.modules,
        }

    def list(self) -> dict[str, Any]:
        return {"workloads": [workload.name for workload in workloads()]}

    def save(self, workload: str, path: str) -> dict[str, Any]:
        """Write a workload to a file."""
        row = next(row for row in workloads() if row.name == workload)
        tensors = row.make("cpu")
        outputs = as_tuple(row.ours(*tensors))
        cotangents = row.cotangents(outputs) if row.cotangents else tuple(map(torch.ones_like, outputs))
        torch.save((row.function, getattr(row.ours, "keywords", {}), tensors, cotangents), path)
        return {}

    def load(self, path: str, results: str) -> dict[str, Any]:
        """Load a workload from a file, and write its results to another."""
        self.loaded = None  # frees its memory first
        self.loaded = Loaded(Path(path))
        torch.save(self.loaded.results(), results)
        return {}

    def round(self, calls: int) -> dict[str, Any]:
        return {"seconds": self.loaded.seconds(calls)}

    def answer(self, line: str) -> dict[str, Any]:
        request = json.loads(line)
        try:
            reply: dict[str, Any] = getattr(self, request.pop("command"))(**request)
            return reply
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    server = Server()
    torch.set_num_threads(int(sys.argv[1]))
    # Only replies go to stdout; other output must not mix with them.
    with os.fdopen(os.dup(1), "w", buffering=1) as replies:
        os.dup2(2, 1)
        for line in iter(sys.stdin.readline, ""):
            replies.write(json.dumps(server.answer(line)) + "\n")


if __name__ == "__main__":
    main()
