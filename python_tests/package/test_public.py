"""What a user sees of the package: what importing it costs, the names that it shows, and examples that run."""

import doctest
import inspect
import pickle
import pydoc
import subprocess
import sys

import pytest
import torch

import kdkernels
from kdkernels import functional, nn
from kdkernels.ops import _loader

FUNCTIONS = [value for value in map(functional.__dict__.get, functional.__all__) if inspect.isfunction(value)]


def test_importing_loads_no_compiler():
    code = (
        "import sys, torch; before = set(sys.modules); import kdkernels; new = set(sys.modules) - before;"
        "print(*sorted({name.split('.')[0] for name in new}));"
        "print(*sorted(name for name in ('torch._dynamo', 'sympy', 'triton', 'numpy.testing') if name in new))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages, compilers = result.stdout.split("\n")[:2]
    assert packages == "kdkernels"
    assert compilers == ""


def test_the_mark_that_avoids_importing_the_compiler_is_the_one_that_torch_sets():
    @torch.compiler.assume_constant_result
    def marked():
        return None

    (name,) = vars(marked)
    assert vars(_loader.why_not_device)[name] == vars(marked)[name]


@pytest.mark.parametrize("module", [kdkernels, functional, nn], ids=lambda module: module.__name__)
def test_dir_shows_what_users_use(module):
    assert dir(module) == sorted(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__module__ == module.__name__
            assert inspect.getdoc(value)


def test_help_says_where_a_function_is():
    for function in FUNCTIONS:
        assert pydoc.render_doc(function).splitlines()[0].endswith("in module kdkernels.functional")


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_symbolic_tracing_records_one_node(function):
    graph = torch.fx.Graph()
    first, *_ = inspect.signature(function).parameters
    first_call, by_name = (torch.fx.Proxy(graph.placeholder(name)) for name in ("x", "y"))
    for node in (function(first_call), function(**{first: by_name})):
        assert node.node.op == "call_function"
        assert node.node.target is function
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_example(function):
    """Every docstring has an example of a few lines, which runs without output."""
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(function, globs={"torch": torch, **{f.__name__: f for f in FUNCTIONS}})
    assert 2 <= len(example.examples) <= 5
    assert doctest.DocTestRunner().run(example).failed == 0


def test_options_are_keywords():
    """All but the tensors, save what users of torch pass by position."""
    by_position = {"lambd", "reduction", "channels", "k", "size_average", "reduce", "log_target"}
    for function in FUNCTIONS:
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                is_tensor = "Tensor" in str(parameter.annotation) and "float" not in str(parameter.annotation)
                assert is_tensor or parameter.name in by_position, f"{function.__name__}({parameter.name})"
    firsts = {next(iter(inspect.signature(function).parameters)) for function in FUNCTIONS}
    assert firsts == {"input", "mean", "logits"}


class Statistics(torch.nn.Module):
    def forward(self, x):
        return functional.batch_norm_stats(x), functional.image_prior_losses(x)


def test_named_results_are_exported_and_saved(tmp_path):
    x = torch.randn(2, 3, 4, 5)
    program = torch.export.export(Statistics(), (x,))
    torch.export.save(program, tmp_path / "program.pt2")
    stats, priors = torch.export.load(tmp_path / "program.pt2").module()(x)
    expected = Statistics()(x)
    assert (type(stats), type(priors)) == (functional.BatchNormStats, functional.ImagePriorLosses)
    torch.testing.assert_close(stats.mean, expected[0].mean)
    torch.testing.assert_close(priors.tv_l2, expected[1].tv_l2)
