"""How the conventions of a project are written down: once for the tests and for the page of the documentation.

Each project has a file here with a ``PROJECT``; :func:`projects` finds them by looking.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

FILES_OF_NO_PROJECT = {"conventions", "page"}


@dataclass(frozen=True)
class Trial:
    """One call of a callable, in float64.

    Attributes:
        name: What distinguishes it from the other trials of the callable.
        compat: Callable of :mod:`kdkernels.compat` with its options bound, called with the inputs.
        documented: The project's formula in plain torch, called with the same inputs.
        inputs: Tensors; those of floating point that get a gradient are in ``differentiable``.
        differentiable: Positions of these inputs.
        names: What the names in the convention's ``ours`` stand for in this call, where that is to be the same; empty
            to leave it out.

    """

    name: str
    compat: Callable[..., Tensor]
    documented: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    differentiable: tuple[int, ...] = (0,)
    names: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Convention:
    """One callable: what it computes, in words and as calls.

    Attributes:
        call: The callable and its arguments, as a user writes them.
        takes: Kind of input.
        computes: The formula or the direction of the divergence.
        temperature: Who multiplies by T²; empty where there is no temperature.
        divisor: What the sum is divided by.
        ours: The same with :mod:`kdkernels.functional`.
        traps: What users get wrong; empty if nothing.
        trials: Calls that are compared with the formula.

    """

    call: str
    takes: str
    computes: str
    temperature: str
    divisor: str
    ours: str
    traps: str
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Project:
    """A project, and how to switch from it.

    Attributes:
        name: Name of the project.
        repository: Owner and name on GitHub.
        module: Module of :mod:`kdkernels.compat`.
        before: Lines of code with the project.
        after: The same lines with :mod:`kdkernels.compat`.
        conventions: Its callables.

    """

    name: str
    repository: str
    module: str
    before: str
    after: str
    conventions: tuple[Convention, ...]


def projects() -> list[Project]:
    """Return the projects, by name."""
    names = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])} - FILES_OF_NO_PROJECT
    modules = [importlib.import_module(f"{__package__}.{name}") for name in names if not name.startswith("test_")]
    return sorted((module.PROJECT for module in modules), key=lambda project: project.name.lower())


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Draw normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
