"""The choice of a backend, and what is said about it."""

import subprocess
import sys

import pytest
import torch
from contract import BACKENDS, KERNELS

import kdkernels
from kdkernels.functional import kl_div_with_logits


def logits():
    return torch.randn(3, 4), torch.randn(3, 4)


def test_choice_is_a_function_and_a_context():
    assert kdkernels.get_backend() == "auto"
    with kdkernels.set_backend("reference"):
        assert kdkernels.get_backend() == "reference"
        with kdkernels.set_backend("native"):
            assert kdkernels.get_backend() == "native"
        assert kdkernels.get_backend() == "reference"
    assert kdkernels.get_backend() == "auto"
    kdkernels.set_backend("reference")
    assert kdkernels.get_backend() == "reference"
    kdkernels.set_backend("auto")


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'cuda'; accepted are 'auto', 'native', 'triton', 'reference'"):
        kdkernels.set_backend("cuda")


def test_a_request_never_falls_back():
    with (
        kdkernels.set_backend("triton"),
        pytest.raises(RuntimeError, match=r"'triton' was requested.*no Triton kernel"),
    ):
        kl_div_with_logits(*logits())


def test_a_device_without_kernels_takes_the_reference():
    """The meta device has no kernels of ours."""
    s, t = (x.to("meta") for x in logits())
    assert kl_div_with_logits(s, t).device.type == "meta"
    with kdkernels.set_backend("native"), pytest.raises(RuntimeError, match="no native kernel of softmax_divergence"):
        kl_div_with_logits(s, t)


def test_choice_is_guarded_in_compiled_code():
    """A compiled function follows a later choice."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if "softmax_divergence" in str(node.target))
        return graph.forward

    function = torch.compile(kl_div_with_logits, backend=backend, fullgraph=True)
    s, t = logits()
    function(s, t)
    with kdkernels.set_backend("reference"):
        function(s, t)
    assert seen[0].endswith("." + BACKENDS[0])
    assert seen[-1].endswith(".reference")


def test_build_info_explains():
    info = kdkernels.build_info()
    assert info["version"] == kdkernels.__version__
    backend, reason = info["backends"]["cpu"]["softmax_divergence"]
    if KERNELS:
        assert info["compiled"]["_C"]["torch_target"] == "2.11"
        assert (backend, reason) == ("native", "the first choice")
    else:
        assert "_C" in info["missing"]
        assert backend == "reference"
        assert "KDKERNELS_BUILD was none" in reason
    assert "_cuda" in info["missing"]


def test_environment_variable_sets_the_first_choice():
    code = "import kdkernels; print(kdkernels.get_backend())"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"KDKERNELS_BACKEND": "reference"}, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "reference"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"KDKERNELS_BACKEND": "fast"}, capture_output=True, text=True, check=False
    )
    assert "backend is 'fast'; accepted are 'auto'" in result.stderr
