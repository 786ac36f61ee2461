"""``python -m kdkernels invert``: images synthesized from a trained network."""

import argparse
import json
from dataclasses import asdict

import torch

from kdkernels.checkpoints import claim_folder, fingerprint
from kdkernels.cli._model_loading import outputs_of
from kdkernels.cli._options import Commands, add_inversion, add_model, inversion_config, positive, trained_model
from kdkernels.cli._pictures import save_curves, save_grid
from kdkernels.distillation import ImagePool
from kdkernels.distillation.data_free import balanced_labels, batch_generator, progress_bar
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
    """Synthesize the batches that the output folder lacks, with a picture and loss curves for each."""
    teacher, config, shape = trained_model(options), inversion_config(options), tuple(options.image_shape)
    classes = torch.arange(outputs_of(teacher, shape))
    if options.classes is not None:
        wrong = [c for c in options.classes if not 0 <= c < len(classes)]
        if wrong:
            raise ValueError(f"--classes includes {wrong}; the network has the classes 0 to {len(classes) - 1}")
        classes = torch.tensor(options.classes)
    inverter = DeepInversion(teacher, shape, config)
    settings = {"inversion": asdict(config), "seed": options.seed, "image_shape": shape, "classes": classes.tolist()}
    claim_folder(options.output, settings | {"teacher": fingerprint(teacher)})
    pool = ImagePool(options.output / "images")
    for index in range(len(pool), options.batches):
        generator = batch_generator(options.seed, index)
        labels = classes[balanced_labels(config.batch_size, len(classes), generator)]
        with progress_bar(config, f"batch {index + 1} of {options.batches}", True) as advance:
            result = inverter.synthesize(labels, generator=generator, progress=advance)
        save_grid(options.output / f"grid_{index:05d}.png", result.images[:256], mean=config.mean, std=config.std)
        save_curves(options.output / f"curves_{index:05d}.png", {"terms of the loss": result.history}, "iteration")
        (options.output / f"history_{index:05d}.json").write_text(json.dumps(result.history))
        pool.add(result.images, result.labels)  # last, so that a batch in the pool is complete
    print(f"Wrote {len(pool)} batches of {config.batch_size} images to {pool.folder}, and pictures beside that folder.")
    return 0
