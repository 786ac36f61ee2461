"""``python -m kdkernels distill``: a student trained from a trained network, without data."""

import argparse

import torch

from kdkernels._files import require_safetensors
from kdkernels.cli._options import (
    Commands,
    add_inversion,
    add_model,
    device,
    execution,
    inversion_config,
    network,
    positive,
    trained_model,
)
from kdkernels.cli._pictures import report_missing_packages, save_curves, save_grid
from kdkernels.distillation import DataFreeConfig, data_free_distill
from kdkernels.distillation.distill import accuracy
from kdkernels.inversion import DeepInversion


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("distill", help="train a student from a trained network, without data")
    add_model(parser, "trained network")
    add_model(parser, "student", "student-")
    add_inversion(parser)
    parser.add_argument("--rounds", type=positive, default=2, help="rounds of synthesis and training (default: 2)")
    parser.add_argument("--batches", type=positive, default=4, help="batches of images per round (default: 4)")
    parser.add_argument("--epochs", type=positive, default=60, help="epochs over all images per round (default: 60)")
    parser.add_argument("--student-batch-size", type=positive, default=64, help="default: 64")
    parser.add_argument(
        "--learning-rate", type=float, default=5e-3, help="learning rate of the student (default: 0.005)"
    )
    parser.add_argument("--temperature", type=float, default=4.0, help="default: 4")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train the student; write its weights, the images and the loss curve."""
    require_safetensors()
    report_missing_packages()
    inversion, shape = inversion_config(options), tuple(options.image_shape)
    config = DataFreeConfig(
        rounds=options.rounds,
        batches=options.batches,
        epochs=options.epochs,
        batch_size=options.student_batch_size,
        learning_rate=options.learning_rate,
        temperature=options.temperature,
    )
    teacher = trained_model(options)
    torch.manual_seed(options.seed)
    student = network(
        options.student_model, options.student_model_args, options.student_checkpoint, options.student_pretrained
    ).to(device(options.device))
    pool, history = data_free_distill(
        teacher,
        student,
        shape,
        DeepInversion(teacher, shape, inversion).num_classes,
        inversion=inversion,
        config=config,
        seed=options.seed,
        folder=options.output,
        **execution(options),
    )
    folder = options.output
    save_grid(folder / "grid.png", pool.images, pool.labels, mean=inversion.mean, std=inversion.std)
    save_curves(folder / "curves.png", {"student's loss": {"loss": history["loss"]}}, "epoch")
    shares = history["recognized"]
    print(
        f"The teacher recognizes {sum(shares) / len(shares):.0%} of its images, and the student "
        f"{accuracy(student, pool.images, pool.labels):.0%}."
    )
    print(f"Wrote the student to {folder / 'student.safetensors'}, and images, history and pictures beside it.")
    return 0
