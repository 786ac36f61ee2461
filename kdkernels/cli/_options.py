"""Options that commands share, and the objects that they describe."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch

from kdkernels.cli._model_loading import load_model, load_weights
from kdkernels.inversion import PRESETS, InversionConfig

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def positive(text: str) -> int:
    """Parse a positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def add_model(parser: argparse.ArgumentParser, role: str, prefix: str = "") -> None:
    """Add the options that name a network, its arguments and its weights."""
    parser.add_argument(
        f"--{prefix}model", required=True, metavar="NAME",
        help=f"{role}: package.module:callable, or the name of a torchvision or timm model",
    )  # fmt: skip
    parser.add_argument(f"--{prefix}model-args", default="{}", metavar="JSON", help="keyword arguments of the model")
    parser.add_argument(
        f"--{prefix}checkpoint", type=Path, metavar="FILE", help="weights: a .safetensors file or a torch checkpoint"
    )


def add_inversion(parser: argparse.ArgumentParser) -> None:
    """Add the options of a synthesis."""
    parser.add_argument("--image-shape", type=positive, nargs=3, required=True, metavar=("C", "H", "W"))
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default="nvlabs-cifar10", help="settings (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=positive, help="images per batch (default: the preset's)")
    parser.add_argument(
        "--iterations", type=positive, help="iterations per batch, over all stages (default: the preset's)"
    )
    parser.add_argument("--mean", type=float, nargs="+", help="mean of the teacher's normalization, one per channel")
    parser.add_argument("--std", type=float, nargs="+", help="deviation of that normalization, one per channel")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, required=True, help="output folder; the same command resumes an interrupted run in it"
    )


def trained_model(options: argparse.Namespace) -> torch.nn.Module:
    """Return the network that the options name, in eval mode on the chosen device."""
    model = load_model(options.model, options.model_args)
    if options.checkpoint is None:
        print(f"No --checkpoint was given: using the initial weights of {options.model}.", file=sys.stderr)
    else:
        load_weights(model, options.checkpoint)
    return model.to(options.device).eval()


def inversion_config(options: argparse.Namespace) -> InversionConfig:
    """Return the preset with the changes that the options ask for.

    Raises:
        ValueError: If only one of ``--mean`` and ``--std`` is given.

    """
    config = InversionConfig.preset(options.preset)
    if (options.mean is None) != (options.std is None):
        given, missing = ("--mean", "--std") if options.std is None else ("--std", "--mean")
        raise ValueError(f"{given} was given without {missing}; give both --mean and --std, or neither")
    if options.mean is not None:
        config = replace(config, mean=tuple(options.mean), std=tuple(options.std))
    if options.batch_size is not None:
        config = replace(config, batch_size=options.batch_size)
    return config if options.iterations is None else config.with_iterations(options.iterations)
