"""``python -m kdkernels invert``: images synthesized from a trained network."""

import argparse
from dataclasses import asdict
from math import prod

from kdkernels._files import require_safetensors, write_json
from kdkernels._networks import placement
from kdkernels._run_folder import describe, require_space, run_folder
from kdkernels.cli._options import (
    Commands,
    add_inversion,
    add_model,
    execution,
    inversion_config,
    positive,
    trained_model,
)
from kdkernels.cli._pictures import report_missing_packages, save_curves, save_grid
from kdkernels.distillation import ImagePool, accuracy
from kdkernels.distillation.synthesis import synthesize_batch
from kdkernels.inversion import DeepInversion


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("invert", help="synthesize images from a trained network")
    add_model(parser, "trained network")
    add_inversion(parser)
    parser.add_argument("--batches", type=positive, default=1, help="number of batches (default: 1)")
    parser.add_argument("--classes", type=int, nargs="+", help="classes to synthesize (default: all)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Synthesize the batches that the output folder lacks, with loss curves for each and a picture of the run."""
    require_safetensors()
    report_missing_packages()
    config, shape = inversion_config(options), tuple(options.image_shape)
    inverter = DeepInversion(trained_model(options), shape, config, **execution(options))
    classes = _classes(options.classes, inverter.num_classes)
    settings = {
        "command": "invert",
        "teacher": describe(inverter.teacher),
        "image_shape": list(shape),
        "seed": options.seed,
        "classes": classes,
        "inversion": {name: value for name, value in asdict(config).items() if name != "source"},
        "execution": inverter.describe_execution(),
    }
    with run_folder(options.output, settings, device=placement(inverter.teacher)[0]) as folder:
        pool = ImagePool(folder)
        require_space(folder, options.batches * config.batch_size * prod(shape) * 4)
        for index in range(options.batches):
            if index in pool:
                continue
            result, share = synthesize_batch(inverter, index, seed=options.seed, classes=classes)
            # Before the batch, so that a batch in the pool has its history.
            write_json(folder / f"history_{index:05d}.json", {"recognized": share, **result.history})
            pool.add(result.images, result.labels, index=index)
            save_curves(folder / f"curves_{index:05d}.png", {"terms of the loss": result.history}, "iteration")
        save_grid(folder / "grid.png", pool.images, pool.labels, mean=config.mean, std=config.std)
        share = accuracy(inverter.teacher, pool.images, pool.labels)
    print(f"The teacher recognizes {share:.0%} of the images.")
    print(f"Wrote {len(pool)} batches of {config.batch_size} images, histories and pictures to {folder}.")
    return 0


def _classes(chosen: list[int] | None, num_classes: int) -> list[int]:
    if chosen is None:
        return list(range(num_classes))
    wrong = [label for label in chosen if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"--classes includes {wrong}; the network has the classes 0 to {num_classes - 1}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"--classes is {chosen}; expected each class once")
    return chosen
