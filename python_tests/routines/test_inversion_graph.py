"""A step of DeepInversion as a CUDA graph, with a stand-in for the graph on machines without a GPU."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from inverted import EVERYTHING, inverter_of, seeded
from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels.inversion import Stage
from kdkernels.inversion import _loop as loops


class Recording(TorchDispatchMode):
    """Records the operations that run, with the tensors that they read and make."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.calls.append((func, args, kwargs or {}, result))
        return result


class StandIn:
    """A graph like that of CUDA, of the operations of a CPU: capturing runs Python once, and replaying does not.

    What was captured is undone, because a device runs nothing of it.
    """

    made: ClassVar = []

    def __init__(self, device):
        self.captures, self.replays = 0, 0
        self.made.append(self)

    def warm_up(self, step):
        step()

    def capture(self, step):
        self.captures += 1
        state = state_of(step.__self__)
        before = [tensor.detach().clone() for tensor in state]
        with Recording() as recording:
            step()
        self.calls = recording.calls
        for tensor, value in zip(state, before, strict=True):
            tensor.detach().copy_(value)

    def replay(self):
        self.replays += 1
        values = {}

        def now(value):
            if isinstance(value, torch.Tensor):
                return values.get(id(value), value)
            return type(value)(map(now, value)) if isinstance(value, (list, tuple)) else value

        with torch.no_grad():
            for func, args, kwargs, recorded in self.calls:
                made = func(*map(now, args), **{name: now(value) for name, value in kwargs.items()})
                pairs = zip(recorded, made, strict=True) if isinstance(recorded, (list, tuple)) else [(recorded, made)]
                values.update({id(old): new for old, new in pairs if isinstance(old, torch.Tensor)})


def state_of(loop):
    held = [value for value in vars(loop).values() if isinstance(value, torch.Tensor)]
    return held + [value for state in loop.optimizer.state.values() for value in state.values()]


def run(config, graph, monkeypatch, **execution):
    """Return the synthesis of all iterations, captured or not."""
    monkeypatch.setattr(loops, "CudaGraph", StandIn)
    objective = inverter_of(config, **execution)._objective
    with objective.ready():
        images = torch.randn(6, 3, 12, 10, generator=seeded())
        loop = loops.Loop(objective, images, torch.arange(6), seeded(1), scaled=False, cuda_graph=graph)
        while loop.done < loop.total:
            loop.step()
        return loop.result()


@pytest.mark.parametrize("keep", ["last", "best", "best_per_image"])
@pytest.mark.parametrize("execution", [{}, {"autocast": "bf16"}], ids=str)
def test_a_captured_step_equals_the_step_bit_for_bit(keep, execution, monkeypatch):
    config = replace(EVERYTHING, keep=keep, stages=(Stage(9, pool=2), Stage(30), Stage(2)))
    expected = run(config, False, monkeypatch, **execution)
    StandIn.made.clear()
    found = run(config, True, monkeypatch, **execution)
    assert [(graph.captures, graph.replays) for graph in StandIn.made] == [(1, 6), (1, 27), (0, 0)]
    assert torch.equal(found.images, expected.images)
    assert found.history == expected.history


class Uncapturable(StandIn):
    def capture(self, step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_a_step_that_cannot_be_captured(monkeypatch):
    config = replace(EVERYTHING, stages=(Stage(6),))
    expected = run(config, False, monkeypatch)
    monkeypatch.setattr("test_inversion_graph.StandIn", Uncapturable)
    with pytest.warns(UserWarning, match=r"without a CUDA graph, .* \(operation not .* capturing\); cuda_graph"):
        found = run(config, "auto", monkeypatch)
    assert torch.equal(found.images, expected.images)
    with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph \(operation .*\); use cuda_graph"):
        run(config, True, monkeypatch)
