"""A source tree without kernels that hides an installed package with them."""

import importlib.machinery
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import kdkernels

PACKAGE = Path(kdkernels.__file__).parent


def missing(folder, *paths):
    """Import the package in a process that sees the other packages of this one; return why its library is missing."""
    code = "import kdkernels; print(kdkernels.build_info()['missing'].get('_C'))"
    # Without site, whose links to trees that are developed in place would find their libraries.
    return subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
    )  # fmt: skip


def test_a_source_tree_that_hides_the_installed_kernels_is_noticed(tmp_path):
    clone, site, others = tmp_path / "clone", tmp_path / "site", tmp_path / "others"
    shutil.copytree(PACKAGE, clone / "kdkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    others.mkdir()
    for path in Path(torch.__file__).parents[1].iterdir():
        if not path.name.startswith(("kdkernels", "__editable__")):
            (others / path.name).symlink_to(path)
    result = missing(clone, clone, others)
    assert result.stdout.startswith("the CPU kernels were not built")
    assert result.stderr == ""
    (site / "kdkernels").mkdir(parents=True)
    (site / "kdkernels" / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").touch()
    result = missing(clone, clone, site, others)
    tree, installed = clone / "kdkernels", site / "kdkernels"
    expected = f"kdkernels was imported from {tree}, which has no CPU kernels, although {installed} has them"
    assert result.stdout.startswith(expected)
    assert f"RuntimeWarning: {expected}" in result.stderr
