"""The Triton kernels: their numbers in Triton's interpreter, and their machine code, compiled without a GPU."""

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

HERE = Path(__file__).parent
BUDGETS = HERE.parents[1] / "bench/budgets/triton.json"
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])
REGENERATE = os.environ.get("KDKERNELS_WRITE_BUDGETS") == "1"


@pytest.mark.skipif(
    VERSION < (3, 7), reason="with NumPy 2.4 the interpreter of Triton 3.6 cannot loop up to an argument"
)
def test_in_the_interpreter():
    """Everything that does not need machine code, in a process of its own: the interpreter is chosen at import."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "triton_interpreter.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]


# Machine code

SCALAR = "i64"  # a number known to the host: the bits of a double
ROWS, MAPS = (1, "i32", 0, 0), ("i32", 1, "i32", 0)  # strides: of classes, then of positions from inner to outer
SOFTMAX, BATCH_NORM, VARIATION = (
    f"{op}.triton_kernels" for op in ("softmax_divergence", "batch_norm_stats", "total_variation")
)
WIDE_LOADS, WIDE_STORES = "LDG.E.128", "STG.E.128"


def softmax(numbers, kind, strides, *, beta=SCALAR, **constants):
    """Arguments that the forward and the backward kernel share."""
    wide = "*fp64" if numbers == "*fp64" else "*fp32"
    arguments = {
        "loss": wide, "saved": wide, "grad_output": wide, "student": numbers, "teacher": numbers,
        "student_gradient": numbers, "teacher_gradient": numbers, "labels": "*i64", "temperature": SCALAR,
        "divergence_weight": SCALAR, "label_weight": SCALAR, "beta": beta, "divisor": SCALAR,
        "student_strides": strides, "teacher_strides": strides, "student_gradient_strides": strides,
        "teacher_gradient_strides": strides,
    }  # fmt: skip
    fixed = {"KIND": kind, "CROSS_ENTROPY": True, "LOSS": "sum", "SAVE": True, "ROWS": strides is ROWS}
    return arguments, {**fixed, "GRAD_BY_POSITION": False, **constants}


def batch_norm(numbers, strides, **constants):
    wide = "*fp64" if numbers == "*fp64" else "*fp32"
    arguments = dict.fromkeys(("mean", "var", "mean_error", "grad_mean", "grad_var"), wide)
    arguments |= {"partial": "*fp64", **dict.fromkeys(("input", "output", "grad_output"), numbers)}
    arguments |= dict.fromkeys(("strides", "input_strides", "output_strides", "grad_strides"), strides)
    return arguments, constants


def distances(**constants):
    return {"sizes": ("i32",) * 32}, {"ROOT": False, "BLOCK": 256, **constants}


def images(numbers, **constants):
    arguments = dict.fromkeys(("image", "output"), numbers)
    arguments |= {"partial": "*fp64", "eps": SCALAR, "grad_l1": "*fp32", "grad_l2": "*fp32", "grad_norm": "*fp32"}
    arguments |= dict.fromkeys(("strides", "output_strides"), ("i32", "i32", "i32"))
    arguments |= {"norms": "*fp32", "sums": "*fp64", "result": "*fp64", "step": 1}
    return arguments, {"REDUCTION": "sum", "MEAN_OF_PAIRS": False, **constants}


def variants(capability):
    """Yield name, module, kernel, arguments, constants, warps and the wide instructions that have to be there."""
    both = (WIDE_LOADS, WIDE_STORES)
    kinds = ("forward_kl", "js") if capability == 80 else ("forward_kl", "js", "clamped_js")
    for numbers in ("fp32",) if capability == 80 else ("fp32", "bf16"):
        pointer = f"*{numbers}"
        for kind in kinds if numbers == "fp32" else ("forward_kl",):
            for shape, strides, whole, positions, classes, warps in (
                ("row of 1000", ROWS, True, 1, 1024, 4),
                ("row of 4096", ROWS, True, 1, 4096, 16),
                ("long row", ROWS, False, 1, 2048, 8),
                ("map", MAPS, True, 32, 32, 4),
            )[0 if kind == "forward_kl" else 2 :]:
                of = softmax(pointer, kind, strides, WHOLE=whole, POSITIONS=positions, CLASSES=classes)
                yield (
                    f"{kind}, {shape}, {numbers}",
                    SOFTMAX,
                    "forward_kernel",
                    *of,
                    warps,
                    (WIDE_LOADS,),
                )
            shapes = (("row", ROWS, 1, 1024), ("map", MAPS, 32, 32))
            for shape, strides, positions, classes in shapes[0 if kind == "forward_kl" else 1 :]:
                of = softmax(pointer, kind, strides, POSITIONS=positions, CLASSES=classes)
                yield (
                    f"{kind}, {shape}, {numbers}",
                    SOFTMAX,
                    "backward_kernel",
                    *of,
                    4,
                    both,
                )
        tile = {"SAMPLES": 1, "POSITIONS": 4096, "CHANNELS": 1}
        of = batch_norm(pointer, ("i32", 1, "i32"), BY_SAMPLES=False, **tile)
        yield f"planes, {numbers}", BATCH_NORM, "moments_kernel", *of, 8, (WIDE_LOADS,)
        of = batch_norm(pointer, ("i32", 1, "i32"), **{**tile, "POSITIONS": 2048})
        yield f"planes, {numbers}", BATCH_NORM, "gradient_kernel", *of, 4, both
        tile = {"SAMPLES": 1, "POSITIONS": 64, "CHANNELS": 64}
        of = batch_norm(pointer, (0, "i32", 1), BY_SAMPLES=False, **tile)
        yield f"channels_last, {numbers}", BATCH_NORM, "moments_kernel", *of, 8, (WIDE_LOADS,)
        of = batch_norm(pointer, (0, "i32", 1), **{**tile, "POSITIONS": 32})
        yield f"channels_last, {numbers}", BATCH_NORM, "gradient_kernel", *of, 4, both
        for kind, directions in (("priors", 4), ("l1", 2), ("isotropic", 2)) if numbers == "fp32" else (("priors", 4),):
            of = images(pointer, KIND=kind, DIRECTIONS=directions, ROWS=8, NUMBERS=256)
            yield f"{kind}, {numbers}", VARIATION, "sums_kernel", *of, 4, (WIDE_LOADS,)
            yield f"{kind}, {numbers}", VARIATION, "gradient_kernel", *of, 8, both
        of = {"output": pointer, "input": pointer, "lambd": SCALAR}, {"BLOCK": 2048}
        yield numbers, "gradient_reversal.triton", "scale_kernel", *of, 8, both
    of = softmax("*fp32", "any_js", ROWS, beta="*fp32", WHOLE=True, POSITIONS=1, CLASSES=1024)
    yield "beta on the device", SOFTMAX, "forward_kernel", *of, 4, (WIDE_LOADS,)
    yield "beta on the device", SOFTMAX, "backward_kernel", *of, 4, both
    of = {"loss": "*fp32", "partial": "*fp32", "divisor": SCALAR}, {"BY_COUNT": True, "BLOCK": 1024}
    yield "by count", SOFTMAX, "reduce_kernel", *of, 4, ()
    of = batch_norm("*fp32", ROWS, UNBIASED=True, SPLITS=64, CHANNELS=16)
    yield "64 splits", BATCH_NORM, "merge_kernel", *of, 4, ()
    for mode in ("l2", "gaussian_kl"):
        of = distances(MODE=mode)
        yield mode, BATCH_NORM, "distance_kernel", *of, 4, ()
        yield mode, BATCH_NORM, "distance_gradient_kernel", *of, 4, ()
    of = images("*fp32", BLOCK=1024)
    yield "parts", VARIATION, "image_kernel", *of, 4, ()
    of = images("*fp32", BLOCK=256)
    of[0].update(dict.fromkeys(("tv_l1", "tv_l2", "l2", "loss"), "*fp32"))
    yield "fp32", VARIATION, "priors_kernel", *of, 4, ()
    of[1].update(ROOT=True, BY_IMAGE=False)
    yield "fp32", VARIATION, "variation_kernel", *of, 4, ()


def machine_code(kernel, arguments, constants, warps, capability):
    """Compile as a launch would: pointers and sizes divisible by 16, but for what is not specialized."""
    signature, fixed, attributes = {}, {}, {}

    def declare(path, kind, specialized):
        if not isinstance(kind, str):
            fixed[path] = kind
            return "constexpr"
        if specialized:
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        kind = constants[name] if parameter.is_constexpr else arguments.get(name, _default(name))
        if parameter.is_constexpr:
            fixed[(i,)] = kind
            signature[name] = "constexpr"
        elif isinstance(kind, tuple):
            parts = enumerate(kind)
            signature[name] = tuple(declare((i, k), part, not parameter.do_not_specialize) for k, part in parts)
        else:
            signature[name] = declare((i,), kind, not parameter.do_not_specialize)
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def _default(name):
    statistics = ("losses", "grad_losses", "mean", "var", "running_mean", "running_var", "by_mean", "by_var")
    return "*fp32" if name in (*statistics, "by_running_mean", "by_running_var") else "i32"


def resources(cubin, folder):
    """Return registers, bytes of stack, and the instructions, from the tools that come with Triton."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    usage, code = (
        subprocess.run([TOOLS / tool, *options, path], capture_output=True, text=True, check=True).stdout
        for tool, options in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", []))
    )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack), code


@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(capability, tmp_path):
    """Nothing spills, no kernel takes more registers than its budget, and memory is accessed 128 bits at a time.

    After a change that is worth its registers, KDKERNELS_WRITE_BUDGETS=1 raises the budgets to what is taken; without
    the file it writes them anew. They are the larger numbers of Triton 3.6 and 3.7.
    """
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    of_capability = budgets.get(f"sm_{capability}", {})
    problems = []
    for name, module, kernel, arguments, constants, warps, wide in variants(capability):
        function = getattr(importlib.import_module(f"kdkernels.ops.{module}"), kernel)
        compiled = machine_code(function, arguments, constants, warps, capability)
        registers, stack, code = resources(compiled.asm["cubin"], tmp_path)
        label = f"{kernel}: {name}"
        if REGENERATE:
            of_capability[label] = max(registers, of_capability.get(label, 0))
        # ptxas of Triton 3.6 puts two numbers of one kernel on the stack.
        if stack > (8 if VERSION < (3, 7) else 0):
            problems.append(f"{label}: {stack} bytes of stack")
        if registers > of_capability.get(label, 0):
            problems.append(f"{label}: {registers} registers, the budget is {of_capability.get(label)}")
        problems += [f"{label}: no {instruction}" for instruction in wide if instruction not in code]
    if REGENERATE:
        BUDGETS.parent.mkdir(exist_ok=True)
        BUDGETS.write_text(json.dumps({**budgets, f"sm_{capability}": of_capability}, indent=1) + "\n")
    assert not problems, "\n".join(problems)
