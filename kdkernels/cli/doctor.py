"""``python -m kdkernels doctor``: what was built, which backend each op uses, and a self-test."""

import argparse

import torch

from kdkernels.cli._options import Commands


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "doctor", help="show what was built and which backend each op uses and why, and run the self-test"
    )
    parser.add_argument("--full", action="store_true", help="test fp32, fp16 and bf16 instead of fp32 alone")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the report; return 1 if the self-test failed."""
    from kdkernels.ops._loader import build_info
    from kdkernels.testing import selftest

    info = build_info()
    print(f"kdkernels {info['version']}, torch {info['torch']} (CUDA {info['torch_cuda']}), Python {info['python']}")
    for library, details in info["compiled"].items():
        print(f"{library}: " + ", ".join(f"{key} {value}" for key, value in details.items()))
    for library, reason in info["missing"].items():
        print(f"{library}: {reason}")
    for device, ops in info["backends"].items():
        print(f"on {device}:")
        for op, (backend, reason) in ops.items():
            print(f"  {op:<28} {backend:<10} {reason}")
    dtypes = selftest.COARSE if options.full else (torch.float32,)
    failed = False
    for device in info["backends"]:
        report = selftest.run(dtypes=dtypes, device=device)
        failed |= not report.passed
        worst = max(report.rows, key=lambda row: row.ours / max(row.eager, row.allowed))
        print(
            f"self-test on {device}: {len(report.rows)} results compared with the float64 reference, "
            f"{len(report.failures)} failed; closest to its bound: {worst.name}, {worst.ours:.1f} units in the last "
            f"place (eager PyTorch {worst.eager:.1f})"
        )
        for row in report.failures:
            print(f"  FAILED {row.name}: {row.ours:.1f} units in the last place, eager PyTorch {row.eager:.1f}")
    return 1 if failed else 0
