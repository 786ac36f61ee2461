"""``python -m kdkernels demo``: from a trained network to a student trained without data, on real digits.

A teacher is trained on scikit-learn's digits, and the data is set aside. Students of half the width learn from it on
four kinds of images: Gaussian noise, images with the prior alone (DeepDream), DeepInversion images and, as an upper
bound, the real ones. All students train for the same number of epochs, the first three on the same number of images.
Settings were chosen on the validation part of the digits; accuracies are measured on the test part.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from kdkernels._files import atomic_file, read_json, write_json
from kdkernels._run_folder import locked_folder
from kdkernels.cli._options import Commands, positive, random_seed
from kdkernels.cli._pictures import report_missing_packages, save_curves, save_grid
from kdkernels.data import load_digits
from kdkernels.distillation import accuracy, distill
from kdkernels.distillation.synthesis import balanced_labels, batch_generator
from kdkernels.inversion import DeepInversion, InversionConfig
from kdkernels.models import SmallCNN
from kdkernels.ops._loader import build_info

NUM_CLASSES, IMAGE_SHAPE = 10, (1, 8, 8)
ARMS = {
    "noise": "Gaussian noise",
    "prior": "images with the prior alone",
    "deep_inversion": "DeepInversion images",
    "real": "real data (upper bound)",
}


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("demo", help="distill a digit classifier without data and compare with baselines")
    parser.add_argument("--seeds", type=positive, default=1, help="number of repetitions (default: 1)")
    parser.add_argument("--seed", type=random_seed, default=0, help="first seed (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="output folder (default: build/demo)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo and print its table."""
    report_missing_packages()
    metrics = run_demo(options.output, seeds=options.seeds, first_seed=options.seed)
    print(table_of(metrics["seeds"]))
    print(f"Wrote pictures, curves, table and metrics to {options.output}.")
    return 0


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo, chosen on the validation part of the digits."""

    teacher_width: int = 16
    teacher_epochs: int = 25
    teacher_learning_rate: float = 3e-3
    student_width: int = 8
    student_epochs: int = 60
    student_learning_rate: float = 5e-3
    batch_size: int = 64
    weight_decay: float = 1e-4
    temperature: float = 4.0
    batches: int = 6
    inversion: InversionConfig = InversionConfig.preset("digits")  # noqa: RUF009  (frozen)


def train_teacher(settings: DemoSettings, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Train the teacher on real images with hard labels."""
    torch.manual_seed(seed)
    model = SmallCNN(settings.teacher_width, NUM_CLASSES)
    epochs = settings.teacher_epochs
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings.teacher_learning_rate, weight_decay=settings.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(labels)).split(settings.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
        scheduler.step()
    return model.eval()


def train_student(
    settings: DemoSettings, teacher: nn.Module, images: Tensor, seed: int
) -> tuple[nn.Module, dict[str, list[float]]]:
    """Train a student on images, from the teacher's outputs alone."""
    torch.manual_seed(seed)
    student = SmallCNN(settings.student_width, NUM_CLASSES)
    optimizer = torch.optim.Adam(
        student.parameters(), lr=settings.student_learning_rate, weight_decay=settings.weight_decay
    )
    epochs = settings.student_epochs
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images), batch_size=settings.batch_size, shuffle=True
    )
    history = distill(
        student, teacher, loader, epochs=epochs, optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        temperature=settings.temperature, progress=False,
    )  # fmt: skip
    return student, history


def synthesize(
    settings: DemoSettings, teacher: nn.Module, config: InversionConfig, seed: int
) -> tuple[Tensor, Tensor, dict[str, list[float]]]:
    """Return images, labels, and the history of the first batch."""
    inverter = DeepInversion(teacher, IMAGE_SHAPE, config)
    batches = []
    for index in range(settings.batches):
        generator = batch_generator(seed, index)
        labels = balanced_labels(index, config.batch_size, NUM_CLASSES, generator)
        batches.append(inverter.synthesize(labels, generator=generator))
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches]), batches[0].history


def run_seed(settings: DemoSettings, seed: int, folder: Path, bar: "tqdm[Any]") -> dict[str, dict[str, float]]:
    """Run the demo for one seed; return accuracy and seconds for the teacher and every arm."""
    digits = load_digits()

    def step(text: str) -> None:
        bar.update()
        bar.set_description(f"seed {seed}: {text}")

    step("teacher")
    start = perf_counter()
    teacher = train_teacher(settings, *digits.train, seed)
    result = {"teacher": {"accuracy": accuracy(teacher, *digits.test), "seconds": perf_counter() - start}}
    curves: dict[str, dict[str, list[float]]] = {"student's loss by epoch": {}}
    for arm, text in ARMS.items():
        step(text)
        start = perf_counter()
        # From here on, only the upper bound sees data.
        if arm == "noise":
            count = settings.batches * settings.inversion.batch_size
            images = torch.randn(count, *IMAGE_SHAPE, generator=batch_generator(seed, 0))
        elif arm == "real":
            images = digits.train[0]
        else:
            config = settings.inversion if arm == "deep_inversion" else replace(settings.inversion, feature_weight=0.0)
            images, labels, history = synthesize(settings, teacher, config, seed)
            if arm == "deep_inversion":
                curves = {"terms of DeepInversion's loss by iteration": history, **curves}
                save_grid(folder / f"digits_seed_{seed}.png", images, labels, mean=[digits.mean], std=[digits.std])
        student, history = train_student(settings, teacher, images, seed)
        curves["student's loss by epoch"][arm] = history["loss"]
        result[arm] = {"accuracy": accuracy(student, *digits.test), "seconds": perf_counter() - start}
    save_curves(folder / f"curves_seed_{seed}.png", curves, "")
    return result


def table_of(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the table of accuracies and times, averaged over the seeds."""
    rows = [("trained on", "test accuracy", "seconds")]
    for arm, text in {"teacher": "teacher: real data, hard labels", **ARMS}.items():
        values = [100 * seed[arm]["accuracy"] for seed in results.values()]
        spread = f" +- {stdev(values):.1f}" if len(values) > 1 else ""
        seconds = fmean(seed[arm]["seconds"] for seed in results.values())
        rows.append((text, f"{fmean(values):.1f} %{spread}", f"{seconds:.1f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def run_demo(
    folder: str | os.PathLike[str], *, seeds: int = 1, first_seed: int = 0, settings: DemoSettings | None = None,
    progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Run the demo, write pictures, table and metrics to a folder, and return the metrics.

    An interrupted run leaves ``unfinished.json``; the same call continues after the last finished seed.

    Args:
        folder: Output folder for ``digits_seed_*.png``, ``curves_seed_*.png``, ``table.txt`` and ``metrics.json``.
        seeds: Number of repetitions, each with another teacher, other images and other students.
        first_seed: First seed.
        settings: Settings; the defaults were chosen on the validation part.
        progress: Whether to show a progress bar.

    """
    settings = settings or DemoSettings()
    described = json.loads(json.dumps(asdict(settings)))
    with locked_folder(folder) as folder:
        unfinished = folder / "unfinished.json"
        results: dict[str, dict[str, dict[str, float]]] = {}
        if unfinished.is_file():
            left = read_json(unfinished, "remove it to start again")
            if isinstance(left, dict) and left.get("settings") == described:
                results = {k: v for k, v in left["seeds"].items() if int(k) in range(first_seed, first_seed + seeds)}
        with tqdm(total=seeds * (1 + len(ARMS)), disable=not progress, unit="step") as bar:
            bar.update(len(results) * (1 + len(ARMS)))
            for seed in range(first_seed, first_seed + seeds):
                if str(seed) not in results:
                    results[str(seed)] = run_seed(settings, seed, folder, bar)
                    write_json(unfinished, {"settings": described, "seeds": results})
        metrics = {
            "mean": {
                arm: {key: fmean(seed[arm][key] for seed in results.values()) for key in ("accuracy", "seconds")}
                for arm in ("teacher", *ARMS)
            },
            "seeds": results,
            "settings": described,
            "build": build_info(),
            "threads": torch.get_num_threads(),
        }
        write_json(folder / "metrics.json", metrics)
        with atomic_file(folder / "table.txt") as file:
            file.write(f"{table_of(results)}\n".encode())
        unfinished.unlink()
    return metrics
