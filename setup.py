"""Builds the compiled libraries of kdkernels.

``KDKERNELS_BUILD`` decides what is built:

- ``auto`` (default): the CPU kernels, and the CUDA kernels if nvcc is found and its major version matches torch's CUDA.
  Otherwise one printed line says why.
- ``cpu``: the CPU kernels only.
- ``cuda``: both, or an error that names what is missing.
- ``none``: nothing; the package then uses its pure PyTorch reference.

The metadata is in pyproject.toml.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET_VERSION = "0x020b000000000000"  # torch 2.11: one build serves it and every later version
DEFAULT_CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"
MEMORY_OF_A_JOB = 2 << 30  # a kernel file takes about 1 GB to compile
CPU_SOURCES = ("csrc/module.cpp", "csrc/*/cpu.cpp", "csrc/isa/*.cpp")
CUDA_SOURCES = ("csrc/cuda_module.cpp", "csrc/*/cuda.cpp", "csrc/*/cuda_kernels.cu")
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc", "env")  # programs before the compiler, as in CXX="ccache g++"
MODES = ("auto", "cpu", "cuda", "none")


def say(message: str) -> None:
    print(f"kdkernels: {message}", file=sys.stderr, flush=True)


def build_mode() -> str:
    mode = os.environ.get("KDKERNELS_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"kdkernels: KDKERNELS_BUILD is {mode!r}; accepted are {', '.join(MODES)}")
    return mode


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def list_headers(folder: Path, name: str) -> Path:
    """Write <stem>_of_every_op.h, which includes that header of every op that has one; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = sorted(path.relative_to(ROOT / "csrc").as_posix() for path in ROOT.glob(f"csrc/*/{name}"))
    text = "".join(f'#include "{header}"\n' for header in headers)
    header = folder / f"{Path(name).stem}_of_every_op.h"
    if not header.exists() or header.read_text() != text:  # a rewritten header would trigger a rebuild
        header.write_text(text)
    return folder


def find_nvcc() -> tuple[str, str] | None:
    """Return the path of nvcc and its version, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    nvcc = nvcc or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", output)
    return (nvcc, found.group(1)) if found else None


def find_cuda_home(nvcc: str) -> Path | None:
    """Return the folder with include/cuda_runtime.h; nvcc on PATH may be a wrapper script in another folder."""
    output = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-"], capture_output=True, text=True, check=False, input="")
    tops = re.findall(r"_HERE_=(\S+)|TOP=(\S+)", output.stderr)
    candidates = [Path(here or top) for here, top in tops]
    candidates += [path.parent for path in list(candidates)]
    candidates += [Path(value) for value in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if value]
    candidates += [Path(nvcc).resolve().parents[1], Path("/usr/local/cuda")]
    return next((c.resolve() for c in candidates if (c / "include" / "cuda_runtime.h").is_file()), None)


def why_no_cuda(torch_cuda: str | None) -> str | None:
    """Return why the CUDA kernels cannot be built here, or None if they can."""
    found = find_nvcc()
    if found is None:
        return f"no nvcc found (PATH, CUDA_HOME); torch was built for CUDA {torch_cuda}"
    nvcc, version = found
    if torch_cuda is None:
        return f"nvcc is {version} ({nvcc}), but this torch was built without CUDA (torch.version.cuda is None)"
    if version.split(".")[0] != torch_cuda.split(".")[0]:
        return f"nvcc is {version} ({nvcc}), but torch was built for CUDA {torch_cuda}: the major versions differ"
    if find_cuda_home(nvcc) is None:
        return f"nvcc is {version} ({nvcc}), but no folder with include/cuda_runtime.h was found; set CUDA_HOME"
    if not sources(*CUDA_SOURCES):
        return f"nvcc is {version} and torch was built for CUDA {torch_cuda}, but this version has no CUDA kernels"
    return None


def cuda_architectures(torch_list: str) -> str:
    """Return the nvcc targets for TORCH_CUDA_ARCH_LIST: sm_90 is machine code, compute_90 is PTX."""
    names = []
    for architecture in torch_list.replace(";", " ").split():
        number, _, ptx = architecture.partition("+")
        if not re.fullmatch(r"\d+\.\d+[af]?", number):
            raise SystemExit(
                f"kdkernels: TORCH_CUDA_ARCH_LIST is {torch_list!r}; expected numbers such as '8.0;9.0+PTX'"
            )
        names += [f"sm_{number.replace('.', '')}"] + ([f"compute_{number.replace('.', '')}"] if ptx else [])
    return " ".join(names)


def bound_jobs() -> None:
    """Limit compile jobs to one per processor, and fewer if memory is short, unless MAX_JOBS is set."""
    if "MAX_JOBS" in os.environ or not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ["MAX_JOBS"] = str(max(1, min(processors, memory // MEMORY_OF_A_JOB)))


def programs_of(command: str) -> list[str]:
    """Return the programs of a compiler's command: launchers, if any, and the compiler."""
    programs = []
    for word in shlex.split(command):
        if "=" in word or (programs and word.startswith("-")):
            continue  # a variable or an option of the launcher
        programs.append(word)
        if Path(word).stem not in LAUNCHERS:
            break
    return programs or [command]


def as_one_program(variable: str, folder: Path) -> None:
    """Replace a command of several words, such as CXX="ccache g++ -m64", by a script: torch expects one program."""
    command = os.environ.get(variable, "")
    words, programs = shlex.split(command), programs_of(command)
    if len(words) < 2 or sys.platform == "win32":
        return
    script = folder / variable / Path(programs[-1]).name  # torch knows compilers by their names
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    script.chmod(0o755)
    os.environ[variable] = str(script)
    if len(programs) > 1:
        os.environ.setdefault("TORCH_NO_COMPILER_WRAPPER", "1")  # torch would add ccache again


def extensions(mode: str) -> tuple[list, dict]:
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            f"kdkernels: building needs {error.name}, which is not installed. Either install it first and build with "
            "`pip install --no-build-isolation .`, or set KDKERNELS_BUILD=none for the pure PyTorch package."
        ) from error
    compiler = cpp_extension.get_cxx_compiler()
    missing = next((program for program in programs_of(compiler) if shutil.which(program) is None), None)
    if missing is not None:
        whole = "" if missing == compiler else f" (CXX is {compiler!r})"
        raise SystemExit(
            f"kdkernels: no C++ compiler: {missing!r} was not found{whole}. Install one (Debian, Ubuntu: apt install "
            "g++; macOS: xcode-select --install), name one in CXX, or set KDKERNELS_BUILD=none for the pure PyTorch "
            "package, which is slower."
        )
    for variable in ("CC", "CXX"):
        as_one_program(variable, ROOT / "build" / "generated")
    # Look for nvcc before torch chooses its own CUDA home.
    missing = "KDKERNELS_BUILD=cpu" if mode == "cpu" else why_no_cuda(torch.version.cuda)
    if mode == "cuda" and missing is not None:
        raise SystemExit(f"kdkernels: KDKERNELS_BUILD=cuda, but {missing}")
    say("building the CPU kernels" + (f"; no CUDA kernels: {missing}" if missing else " and the CUDA kernels"))
    bound_jobs()
    generated = list_headers(ROOT / "build" / "generated", "cpu_kernels.h")
    includes = [pybind11.get_include(), str(ROOT / "csrc"), str(generated)]
    define = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    flags = (
        ["/O2"]
        if sys.platform == "win32"
        else ["-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-fno-math-errno", "-g0"]
    )
    modules = [
        cpp_extension.CppExtension(
            "kdkernels._C",
            sources(*CPU_SOURCES),
            include_dirs=includes,
            define_macros=define,
            extra_compile_args=flags,
        )
    ]
    if missing is None:
        cpp_extension.CUDA_HOME = str(find_cuda_home(find_nvcc()[0]))
        architectures = cuda_architectures(os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES))
        modules.append(
            cpp_extension.CUDAExtension(
                "kdkernels._cuda",
                sources(*CUDA_SOURCES),
                include_dirs=includes,
                define_macros=[*define, ("USE_CUDA", None)],
                extra_compile_args={
                    "cxx": [*flags, f'-DKDKERNELS_CUDA_ARCHITECTURES="{architectures}"'],
                    "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden"],
                },
            )
        )
    return modules, {"build_ext": cpp_extension.BuildExtension}


if __name__ == "__main__":
    mode = build_mode()
    # Only commands that compile need a compiler; sdist and metadata do not.
    compiles = any(command.startswith(("build", "bdist", "install", "develop", "editable")) for command in sys.argv[1:])
    if mode == "none" or not compiles:
        if compiles:
            say("KDKERNELS_BUILD=none: nothing is compiled, ops use the pure PyTorch reference")
        setup()
    else:
        ext_modules, cmdclass = extensions(mode)
        setup(ext_modules=ext_modules, cmdclass=cmdclass)
