"""Options that commands share, and the objects that they describe."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, get_args

import torch
from torch import nn

from kdkernels._memory_format import MEMORY_FORMATS as ACCEPTED
from kdkernels._networks import check_finite
from kdkernels.checkpoints import load_weights
from kdkernels.cli._model_loading import load_model
from kdkernels.inversion import PRESETS, Execution, InversionConfig
from kdkernels.inversion._network import Autocast
from kdkernels.inversion.config import Keep

MEMORY_FORMATS = {str(memory_format).removeprefix("torch."): memory_format for memory_format in ACCEPTED}
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def positive(text: str) -> int:
    """Parse a positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def random_seed(text: str) -> int:
    """Parse a seed."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a seed; expected a number from 0 to 4294967295")
    return value


def add_model(parser: argparse.ArgumentParser, role: str, prefix: str = "") -> None:
    """Add the options that name a network, its arguments and its weights."""
    parser.add_argument(
        f"--{prefix}model", required=True, metavar="NAME",
        help=f"{role}: package.module:callable, or the name of a torchvision or timm model",
    )  # fmt: skip
    parser.add_argument(f"--{prefix}model-args", default="{}", metavar="JSON", help="keyword arguments of the model")
    parser.add_argument(
        f"--{prefix}checkpoint", type=Path, metavar="FILE", help="weights: a safetensors file or a torch checkpoint"
    )
    parser.add_argument(
        f"--{prefix}pretrained", action="store_true", help="take the published weights of a torchvision or timm model"
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
    parser.add_argument(
        "--keep", choices=get_args(Keep), help="images to return: see InversionConfig (default: the preset's)"
    )
    parser.add_argument("--mean", type=float, nargs="+", help="mean of the teacher's normalization, one per channel")
    parser.add_argument("--std", type=float, nargs="+", help="deviation of that normalization, one per channel")
    parser.add_argument(
        "--memory-format", choices=("auto", *MEMORY_FORMATS), default="auto",
        help="memory format of the networks: auto takes channels_last on a CPU (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--autocast", choices=get_args(Autocast),
        help="compute the networks in 16 bits; auto takes bf16 where the device has instructions for it (default: not)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="run the networks through torch.compile")
    parser.add_argument("--seed", type=random_seed, default=0, help="default: 0")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, required=True, help="output folder; the same command resumes an interrupted run in it"
    )


def device(name: str) -> torch.device:
    """Return a device on which tensors can be made.

    Raises:
        ValueError: If there is no such device.

    """
    try:
        found = torch.device(name)
        torch.zeros(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count()
        known = ["cpu", *(f"cuda:{index}" for index in range(count))]
        reason = (
            "no such kind of device" if "device string" in str(error) else str(error).partition("\n")[0].rstrip(".")
        )
        raise ValueError(
            f"--device is {name!r}, which cannot be used ({reason}); expected {' or '.join(known)}"
        ) from error
    return found


def trained_model(options: argparse.Namespace) -> nn.Module:
    """Return the network that the options name, with trained weights, in eval mode on the chosen device.

    Raises:
        ValueError: If it would have random weights, or weights that are not finite.

    """
    if options.checkpoint is None and not options.pretrained:
        if ":" not in options.model:
            raise ValueError(
                f"{options.model} would have random weights; give its trained ones by --checkpoint FILE, or take the "
                "published ones with --pretrained"
            )
        print(f"No --checkpoint was given: using the weights with which {options.model} returns the network.")
    model = network(options.model, options.model_args, options.checkpoint, options.pretrained)
    check_finite(model, "the network")
    return model.to(device(options.device)).eval()


def network(name: str, arguments: str, checkpoint: Path | None, pretrained: bool) -> nn.Module:
    """Return a network with the weights that were given.

    Raises:
        ValueError: If two kinds of weights were given, or they do not fit.

    """
    if checkpoint is not None and pretrained:
        raise ValueError(f"a checkpoint and the published weights were both given for {name}; expected one of them")
    model = load_model(name, arguments, pretrained=pretrained)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def execution(options: argparse.Namespace) -> Execution:
    """Return how the synthesis runs."""
    memory_format = options.memory_format
    return {
        "memory_format": MEMORY_FORMATS.get(memory_format, "auto"),
        "autocast": options.autocast,
        "compile": options.compile,
    }


def inversion_config(options: argparse.Namespace) -> InversionConfig:
    """Return the preset with the changes that the options ask for.

    Raises:
        ValueError: If only one of ``--mean`` and ``--std`` is given, or they are missing or do not match the channels.

    """
    config, channels = InversionConfig.preset(options.preset), options.image_shape[0]
    if (options.mean is None) != (options.std is None):
        given, missing = ("--mean", "--std") if options.std is None else ("--std", "--mean")
        raise ValueError(f"{given} was given without {missing}; give both --mean and --std, or neither")
    if options.mean is not None:
        config = replace(config, mean=tuple(options.mean), std=tuple(options.std))
    if config.clip and config.mean is None:
        raise ValueError(f"--preset {options.preset} keeps images in the range of real pixels; give --mean and --std")
    if config.mean is not None and config.std is not None and {len(config.mean), len(config.std)} != {channels}:
        raise ValueError(
            f"the normalization has {len(config.mean)} means and {len(config.std)} deviations, but --image-shape "
            f"{channels} channels; give --mean and --std with one value per channel"
        )
    if options.keep is not None:
        config = replace(config, keep=options.keep)
    if options.batch_size is not None:
        config = replace(config, batch_size=options.batch_size)
    return config if options.iterations is None else config.with_iterations(options.iterations)
