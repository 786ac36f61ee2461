"""DeepInversion whose networks run through torch.compile."""

from dataclasses import replace

import pytest
import torch
from inverted import EVERYTHING, assert_as_before, inverter_of, pair, seeded, state_of

from kdkernels.inversion import DeepInversion, Stage

F64 = torch.float64


def compile_by(backend, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend, **options))


def test_compiled_networks_give_what_eager_ones_give(monkeypatch):
    """In two stages, whose images differ in size, and in two calls, without compiling one code object twice."""
    compile_by("aot_eager", monkeypatch)
    config = replace(EVERYTHING, stages=(Stage(2, pool=2), Stage(1)))
    inverters = [inverter_of(config, F64, compile=compile) for compile in (False, True)]
    models = (inverters[1].teacher, inverters[1].student)
    before = [state_of(model) for model in models]
    for seed in range(2):
        with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
            expected, found = (one.synthesize(torch.arange(4), generator=seeded(seed)) for one in inverters)
        torch.testing.assert_close(found.images, expected.images, rtol=1e-9, atol=1e-9)
        assert found.history["loss"] == pytest.approx(expected.history["loss"], rel=1e-11)
    for model, state in zip(models, before, strict=True):
        assert_as_before(model, state)
    images = torch.randn(2, 3, 12, 10, dtype=F64)
    eager, compiled = (one.gradient_norms(images, torch.arange(2)) for one in inverters)
    for name, norm in eager.items():
        assert compiled[name].item() == pytest.approx(norm.item(), rel=1e-11)


def test_compiled_layers_are_fused_with_their_statistics(monkeypatch):
    """The ReLUs, modules of the network, are part of the fused layers in the graph that is compiled."""
    kinds = []

    def recording(graph, inputs):
        kinds.append([str(node.target) for node in graph.graph.nodes if "call" in node.op])
        return graph.forward

    compile_by(recording, monkeypatch)
    config = replace(EVERYTHING, compete_weight=0.0, stages=(Stage(2),))
    DeepInversion(pair()[0], (3, 12, 10), config, compile=True).synthesize(torch.arange(4))
    assert len(kinds) == 1
    assert len([kind for kind in kinds[0] if "conv2d" in kind]) == 3
    assert not [kind for kind in kinds[0] if "relu" in kind]


def test_the_inductor():
    config = replace(EVERYTHING, stages=(Stage(3),))
    inverters = [DeepInversion(pair()[0], (3, 12, 10), config, compile=compile) for compile in (False, True)]
    expected, found = (one.synthesize(torch.arange(4), generator=seeded()) for one in inverters)
    assert found.history["loss"] == pytest.approx(expected.history["loss"], rel=1e-5)
    torch.testing.assert_close(found.images, expected.images, rtol=1e-3, atol=1e-3)
    images = torch.randn(4, 3, 12, 10)
    eager, compiled = (one.gradient_norms(images, torch.arange(4)) for one in inverters)
    for name, norm in eager.items():
        assert compiled[name].item() == pytest.approx(norm.item(), rel=1e-4), name


def test_a_failure_of_the_compiler_is_one_sentence(monkeypatch):
    def failing(graph, inputs):
        raise RuntimeError("no compiler here\nand more")

    compile_by(failing, monkeypatch)
    inverter = inverter_of(replace(EVERYTHING, stages=(Stage(2),)), compile=True)
    before = state_of(inverter.teacher)
    for call in (
        lambda: inverter.synthesize(torch.arange(4)),
        lambda: inverter.objective(torch.zeros(2, 3, 12, 10), torch.arange(2)),
    ):
        with pytest.raises(
            RuntimeError, match=r"^torch.compile cannot compile the networks \(.*\); use compile=False$"
        ):
            call()
    assert_as_before(inverter.teacher, before)
