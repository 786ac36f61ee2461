"""The callables of :mod:`kdkernels.compat` compute what their projects document, in value and gradient."""

import importlib
import inspect
import pkgutil

import pytest
import torch

from kdkernels import compat, functional
from kdkernels.testing.selftest import results_of

from .conventions import projects
from .page import PAGE, page

PROJECTS = projects()
TRIALS = {
    f"{project.module}: {of.call}: {trial.name}": trial
    for project in PROJECTS
    for of in project.conventions
    for trial in of.trials
}


@pytest.mark.parametrize("trial", TRIALS.values(), ids=TRIALS)
def test_value_and_gradient_are_those_of_the_project(trial):
    found = results_of(trial.compat, trial.inputs, trial.differentiable)
    expected = results_of(trial.documented, trial.inputs, trial.differentiable)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("of", [of for project in PROJECTS for of in project.conventions], ids=lambda of: of.call)
def test_our_own_call_gives_the_same(of):
    """What the page shows, with the names of the call filled in."""
    for trial in of.trials:
        if trial.names:
            found = eval(of.ours, {**vars(functional), **trial.names})
            torch.testing.assert_close(found, trial.compat(*trial.inputs), rtol=1e-10, atol=1e-10)


def test_every_callable_has_a_convention():
    modules = {module.name for module in pkgutil.iter_modules(compat.__path__) if not module.name.startswith("_")}
    assert modules == {project.module for project in PROJECTS}
    for project in PROJECTS:
        names = set(importlib.import_module(f"kdkernels.compat.{project.module}").__all__)
        assert names == {of.call.split("(")[0] for of in project.conventions}
        for name in names:
            assert inspect.getdoc(getattr(importlib.import_module(f"kdkernels.compat.{project.module}"), name))


def test_the_page_is_up_to_date():
    """Made by ``python -m python_tests.compat.page --write``."""
    assert PAGE.read_text() == page()
