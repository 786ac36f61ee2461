"""The build switch, build errors, and packages built from the source distribution."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the source tree is not available")


def build(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_unknown_switch():
    result = build("build_ext", "--dry-run", KDKERNELS_BUILD="gpu")
    assert result.returncode != 0
    assert "KDKERNELS_BUILD is 'gpu'; accepted are auto, cpu, cuda, none" in result.stderr


def test_a_missing_compiler_is_an_error_with_a_remedy():
    result = build("build_ext", KDKERNELS_BUILD="auto", CXX="no-such-compiler")
    assert result.returncode != 0
    assert "no C++ compiler: 'no-such-compiler' was not found" in result.stderr
    assert "KDKERNELS_BUILD=none" in result.stderr


def test_cuda_says_what_is_missing(tmp_path):
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 1.0, V1.0.1'\n")
    (tmp_path / "nvcc").chmod(0o755)
    result = build("build_ext", KDKERNELS_BUILD="cuda", CUDA_HOME="", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode != 0
    assert "KDKERNELS_BUILD=cuda, but nvcc is 1.0" in result.stderr


def install(source: Path, target: Path, mode: str) -> dict[str, str]:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", target, source],
        env={**os.environ, "KDKERNELS_BUILD": mode},
        check=True,
        cwd=target.parent,
    )
    return {**os.environ, "PYTHONPATH": str(target)}


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory):
    """The source distribution, made from a copy of the tree so that nothing else can be found."""
    copy = tmp_path_factory.mktemp("tree") / "kdkernels"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    result = build("-q", "sdist", cwd=copy, KDKERNELS_BUILD="none")
    assert result.returncode == 0, result.stderr
    (archive,) = (copy / "dist").glob("*.tar.gz")
    return archive


CHECK = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]  # not the tree's own build
import torch, kdkernels, kdkernels.functional as F
assert kdkernels.__file__.startswith(sys.argv[1]), kdkernels.__file__
loss = F.distillation_loss(torch.randn(4, 5, requires_grad=True), torch.randn(4, 5), torch.arange(4))
loss.backward()
print({op: backend for op, (backend, _) in kdkernels.build_info()["backends"]["cpu"].items()}["softmax_divergence"])
"""


def backend_in(site, environment):
    command = [sys.executable, "-c", CHECK, str(site.parent)]
    result = subprocess.run(command, env=environment, cwd=site.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(("build", "backend"), [("none", "reference"), ("cpu", "native")])
def test_the_source_distribution_installs(source_distribution, tmp_path, build, backend):
    """It installs with kernels, and without a compiler."""
    site = tmp_path / "site"
    environment = install(source_distribution, site, build)
    assert backend_in(site, environment) == backend
    assert bool(list(site.rglob("*.so"))) == (build == "cpu")


@pytest.mark.slow
def test_isolated_build(source_distribution, tmp_path):
    """A plain pip install creates its own build environment."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", source_distribution],
        env={**os.environ, "PIP_CONSTRAINT": str(ROOT / "constraints.txt")},
        check=True,
        cwd=tmp_path,
    )
    site = tmp_path / "site"
    assert backend_in(site, {**os.environ, "PYTHONPATH": str(site)}) == "native"
