"""``python -m kdkernels distill``: a student trained from a trained network, without data."""

import argparse
import json

import torch

from kdkernels.cli._model_loading import load_model, load_weights, outputs_of
from kdkernels.cli._options import Commands, add_inversion, add_model, inversion_config, positive, trained_model
from kdkernels.cli._pictures import save_curves, save_grid
from kdkernels.distillation import DataFreeConfig, data_free_distill


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
    from safetensors.torch import save_file

    teacher, inversion, shape = trained_model(options), inversion_config(options), tuple(options.image_shape)
    torch.manual_seed(options.seed)
    student = load_model(options.student_model, options.student_model_args)
    if options.student_checkpoint is not None:
        load_weights(student, options.student_checkpoint)
    student = student.to(options.device)
    num_classes = outputs_of(teacher, shape)
    if outputs_of(student, shape) != num_classes:
        raise ValueError(
            f"--student-model returns {outputs_of(student, shape)} classes, but the teacher returns {num_classes}; "
            "set the number of classes with --student-model-args"
        )
    config = DataFreeConfig(
        rounds=options.rounds,
        batches=options.batches,
        epochs=options.epochs,
        batch_size=options.student_batch_size,
        learning_rate=options.learning_rate,
        temperature=options.temperature,
    )
    pool, history = data_free_distill(
        teacher,
        student,
        shape,
        num_classes,
        inversion=inversion,
        config=config,
        seed=options.seed,
        folder=options.output,
    )
    weights = options.output / "student.safetensors"
    save_file({name: tensor.contiguous().cpu() for name, tensor in student.state_dict().items()}, weights)
    save_grid(options.output / "grid.png", pool.images[:256], mean=inversion.mean, std=inversion.std)
    save_curves(options.output / "curves.png", {"student's loss": {"loss": history["loss"]}}, "epoch")
    (options.output / "history.json").write_text(json.dumps(history))
    print(f"Wrote the student to {weights}.")
    return 0
