"""The Triton kernels: their results in Triton's interpreter, and their machine code, compiled without a GPU."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdkernels.ops._cases import registry

HERE = Path(__file__).parent
BUDGETS = HERE.parents[1] / "bench/budgets/triton.json"
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])
REGENERATE = os.environ.get("KDKERNELS_WRITE_BUDGETS") == "1"


@pytest.mark.skipif(
    VERSION < (3, 7), reason="with NumPy 2.4 the interpreter of Triton 3.6 cannot loop up to an argument"
)
@pytest.mark.parametrize("grid", ["core", pytest.param("full", marks=pytest.mark.slow)])
def test_in_the_interpreter(grid):
    """Tests that need no machine code, in a separate process: the interpreter is chosen at import."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"KDKERNELS_TEST_TARGET": "cpu-triton", "KDKERNELS_TEST_GRID": grid}
    files = [HERE / "triton_interpreter.py", *(HERE.parent / "ops").glob("triton_*.py")]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
    options += ["-k", "equals_reference"] if grid == "core" else []
    command = [sys.executable, "-m", "pytest", *map(str, files), *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]


# Machine code


def variants(capability):
    """Yield the variants of every op for a compute capability."""
    for op in registry():
        if importlib.util.find_spec(f"kdkernels.ops.{op}.triton_cases"):
            yield from importlib.import_module(f"kdkernels.ops.{op}.triton_cases").variants(capability)


def machine_code(variant, capability):
    """Compile as a launch would: pointers and sizes divisible by 16, except those not specialized."""
    signature, fixed, attributes = {}, {}, {}

    def declare(path, kind, specialized):
        if not isinstance(kind, str):
            fixed[path] = kind
            return "constexpr"
        if specialized:
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    for i, parameter in enumerate(variant.kernel.params):
        name = parameter.name
        kind = variant.constants[name] if parameter.is_constexpr else variant.arguments.get(name, _default(name))
        if parameter.is_constexpr:
            fixed[(i,)] = kind
            signature[name] = "constexpr"
        elif isinstance(kind, tuple):
            parts = enumerate(kind)
            signature[name] = tuple(declare((i, k), part, not parameter.do_not_specialize) for k, part in parts)
        else:
            signature[name] = declare((i,), kind, not parameter.do_not_specialize)
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=fixed, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": variant.warps})


def _default(name):
    statistics = ("losses", "grad_losses", "mean", "var", "running_mean", "running_var", "by_mean", "by_var")
    return "*fp32" if name in (*statistics, "by_running_mean", "by_running_var") else "i32"


def resources(cubin, folder):
    """Return the registers, the bytes of stack and the instructions, from the tools that come with Triton."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    usage, code = (
        subprocess.run([TOOLS / tool, *options, path], capture_output=True, text=True, check=True).stdout
        for tool, options in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", []))
    )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack), code


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(capability, tmp_path):
    """Nothing spills, no kernel takes more registers than its budget, and memory is accessed 128 bits at a time.

    After a change that justifies more registers, KDKERNELS_WRITE_BUDGETS=1 raises the budgets to the current numbers;
    if the file is missing, it writes all budgets. They are the larger numbers of Triton 3.6 and 3.7.
    """
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    of_capability = budgets.get(f"sm_{capability}", {})
    problems = []
    for variant in variants(capability):
        compiled = machine_code(variant, capability)
        registers, stack, code = resources(compiled.asm["cubin"], tmp_path)
        label = f"{variant.kernel.__name__}: {variant.name}"
        if REGENERATE:
            of_capability[label] = max(registers, of_capability.get(label, 0))
        # The ptxas of Triton 3.6 puts two numbers of one kernel on the stack.
        if stack > (8 if VERSION < (3, 7) else 0):
            problems.append(f"{label}: {stack} bytes of stack")
        if registers > of_capability.get(label, 0):
            problems.append(f"{label}: {registers} registers, the budget is {of_capability.get(label)}")
        problems += [f"{label}: no {instruction}" for instruction in variant.wide if instruction not in code]
    if REGENERATE:
        BUDGETS.parent.mkdir(exist_ok=True)
        BUDGETS.write_text(json.dumps({**budgets, f"sm_{capability}": of_capability}, indent=1) + "\n")
    assert not problems, "\n".join(problems)
