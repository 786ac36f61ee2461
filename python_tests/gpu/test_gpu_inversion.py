"""DeepInversion on a GPU: its step as a CUDA graph, and a host that waits at checks alone."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products need it
if not torch.cuda.is_available():
    pytest.skip(
        "PyTorch finds no CUDA device; `make gpu` runs these tests on a machine with one", allow_module_level=True
    )

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "routines"))
from inverted import EVERYTHING, pair, seeded

from kdkernels.inversion import DeepInversion, Stage

CONFIG = replace(EVERYTHING, stages=(Stage(9, pool=2), Stage(30), Stage(2)))


def inverter_of(config, **execution):
    teacher, student = (model.cuda() for model in pair())
    return DeepInversion(teacher, (3, 12, 10), config, student=student, **execution)


@pytest.mark.parametrize("keep", ["last", "best", "best_per_image"])
@pytest.mark.parametrize("execution", [{}, {"autocast": "bf16"}, {"compile": True}], ids=str)
def test_a_captured_step_equals_the_step_bit_for_bit(keep, execution):
    results = [
        inverter_of(replace(CONFIG, keep=keep), cuda_graph=graph, **execution).synthesize(
            torch.arange(6), generator=seeded()
        )
        for graph in (False, True)
    ]
    assert torch.equal(results[0].images, results[1].images)
    assert results[0].history == results[1].history


@pytest.mark.parametrize("execution", [{}, {"autocast": "bf16"}, {"autocast": "fp16"}, {"cuda_graph": True}], ids=str)
def test_the_host_waits_at_checks_alone(execution):
    with inverter_of(CONFIG, **{"cuda_graph": False, **execution}).loop(torch.arange(6), generator=seeded()) as loop:
        while loop.done < loop.total:
            begins = loop.done in (0, 9, 39)  # and a graph is captured in the fourth iteration of a stage
            captures = "cuda_graph" in execution and loop.done in (3, 12)
            checks = (loop.done + 1) % 20 == 0 or loop.done + 1 == loop.total
            torch.cuda.set_sync_debug_mode("default" if begins or captures or checks else "error")
            try:
                loop.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert loop.result().images.isfinite().all()


def test_the_images_are_those_of_a_cpu():
    """Up to rounding, for one iteration of each stage; later ones depend on the order of additions."""
    config = replace(CONFIG, stages=(Stage(1, pool=2), Stage(1)))
    expected = DeepInversion(pair()[0], (3, 12, 10), config, student=pair()[1]).synthesize(
        torch.arange(6), generator=seeded()
    )
    found = inverter_of(config).synthesize(torch.arange(6), generator=seeded())
    assert found.history["loss"] == pytest.approx(expected.history["loss"], rel=1e-3)
    assert not found.images.is_cpu


def test_fp16_has_no_graph():
    with pytest.raises(ValueError, match="cuda_graph is True, but the networks compute in fp16"):
        inverter_of(CONFIG, cuda_graph=True, autocast="fp16").synthesize(torch.arange(6))
