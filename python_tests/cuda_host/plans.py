"""How launches divide the work, for sizes that no test could allocate; every op has a function in <op>_plans.cpp."""

import ctypes

from emulated import installed

BIG = 2**33 + 5


class Plan(ctypes.Structure):
    """The struct of include/cuda_host/plan.h."""

    _fields_ = (
        ("grid", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("shared_bytes", ctypes.c_int64),
        ("covered", ctypes.c_int64),
    )


def check_launch(name: str, arguments: tuple[int, ...], needed: int) -> None:
    """Check that a launch covers the work within the limits of a GPU."""
    function = getattr(installed(), name)
    function.restype = Plan
    plan = function(*(ctypes.c_int64(argument) for argument in arguments))
    assert 1 <= plan.grid <= 2**31 - 1
    assert 32 <= plan.block <= 1024
    assert plan.block % 32 == 0
    assert 0 <= plan.shared_bytes <= 232448
    assert plan.covered >= needed
