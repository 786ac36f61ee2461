"""The command line: ``python -m kdkernels`` or ``kdkernels``."""

import argparse
import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType

import torch

from kdkernels._checkpoint import claim_folder, fingerprint
from kdkernels._version import __version__
from kdkernels.cli._model_loading import load_model, load_weights, outputs_of
from kdkernels.inversion import PRESETS, DeepInversion, InversionConfig
from kdkernels.ops import _loader
from kdkernels.ops._cases import SHORT_NAMES, workload, workload_functions

INTERRUPTED = 130
AGAIN_AFTER = 0.5  # seconds
_DTYPES = {name: dtype for dtype, name in SHORT_NAMES.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        with _insistent_interrupts():
            return int(options.run(options))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, ImportError) as error:
        print(f"kdkernels {options.command}: {error}", file=sys.stderr)
        return 2


@contextmanager
def _insistent_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt again until it is heard: Python drops one that falls into a destructor."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, AGAIN_AFTER)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kdkernels", description="Knowledge distillation on fused kernels, with data and without."
    )
    parser.add_argument("--version", action="version", version=f"kdkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands)
    _add_invert(commands)
    _add_distill(commands)
    _add_bench(commands)
    doctor = commands.add_parser("doctor", help="say what was built, which backend each op takes and why, and test it")
    doctor.add_argument("--full", action="store_true", help="test every case in every dtype, not fp32 alone")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    demo = commands.add_parser("demo", help="distil a digit classifier without data and compare with baselines")
    demo.add_argument("--seeds", type=_positive, default=1, help="repetitions (default: 1)")
    demo.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    demo.add_argument("--output", type=Path, default=Path("build/demo"), help="folder (default: build/demo)")
    demo.set_defaults(run=_demo)


def _add_model(parser: argparse.ArgumentParser, role: str, prefix: str = "") -> None:
    parser.add_argument(
        f"--{prefix}model", required=True, metavar="NAME",
        help=f"{role}: package.module:callable, or a name of torchvision or timm",
    )  # fmt: skip
    parser.add_argument(f"--{prefix}model-args", default="{}", metavar="JSON", help="arguments of the callable")
    parser.add_argument(
        f"--{prefix}checkpoint", type=Path, metavar="FILE", help="its weights: .safetensors, or a torch file"
    )


def _add_inversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-shape", type=_positive, nargs=3, required=True, metavar=("C", "H", "W"))
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default="nvlabs-cifar10", help="settings (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=_positive, help="images of a batch (default: the preset's)")
    parser.add_argument("--iterations", type=_positive, help="of a batch, over all stages (default: the preset's)")
    parser.add_argument("--mean", type=float, nargs="+", help="the teacher's normalization, one value a channel")
    parser.add_argument("--std", type=float, nargs="+", help="likewise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="folder; an interrupted run goes on from it")


def _add_invert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    invert = commands.add_parser("invert", help="synthesize images from a trained network")
    _add_model(invert, "the trained network")
    _add_inversion(invert)
    invert.add_argument("--batches", type=_positive, default=1, help="default: 1")
    invert.add_argument("--classes", type=int, nargs="+", help="classes to synthesize (default: all)")
    invert.set_defaults(run=_invert)


def _add_distill(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    distill = commands.add_parser("distill", help="train a student from a trained network, without data")
    _add_model(distill, "the trained network")
    _add_model(distill, "the student", "student-")
    _add_inversion(distill)
    distill.add_argument("--rounds", type=_positive, default=2, help="synthesize and train so often (default: 2)")
    distill.add_argument("--batches", type=_positive, default=4, help="of images a round (default: 4)")
    distill.add_argument("--epochs", type=_positive, default=60, help="over all images, a round (default: 60)")
    distill.add_argument("--student-batch-size", type=_positive, default=64, help="default: 64")
    distill.add_argument("--learning-rate", type=float, default=5e-3, help="of the student (default: 0.005)")
    distill.add_argument("--temperature", type=float, default=4.0, help="default: 4")
    distill.set_defaults(run=_distill)


def _add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    bench = commands.add_parser("bench", help="time a function on a shape of your own against PyTorch")
    functions = list(workload_functions())
    bench.add_argument("--op", required=True, choices=functions, metavar="FUNCTION", help=", ".join(functions))
    bench.add_argument(
        "--shape", required=True, type=_positive, nargs="+", metavar="SIZE",
        help="of logits (classes last), images [B C H W] or an activation [N C ...]",
    )  # fmt: skip
    bench.add_argument("--dtype", choices=list(_DTYPES), default="fp32", help="default: fp32")
    bench.add_argument("--variant", default="", help='"dim=1" for logits [B, C, ...], "channels_last" for activations')
    bench.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    bench.add_argument("--threads", type=_positive, help="of the CPU (default: what PyTorch takes)")
    bench.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes seconds")
    bench.set_defaults(run=_bench)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _demo(options: argparse.Namespace) -> int:
    from kdkernels.cli.demo import run_demo, table_of

    metrics = run_demo(options.output, seeds=options.seeds, first_seed=options.seed)
    print(table_of(metrics["seeds"]))
    print(f"pictures, curves, table and metrics are in {options.output}")
    return 0


def _trained(options: argparse.Namespace) -> torch.nn.Module:
    model = load_model(options.model, options.model_args)
    if options.checkpoint is None:
        print(f"no --checkpoint: using the weights that {options.model} comes with", file=sys.stderr)
    else:
        load_weights(model, options.checkpoint)
    return model.to(options.device).eval()


def _inversion(options: argparse.Namespace) -> InversionConfig:
    config = InversionConfig.preset(options.preset)
    if (options.mean is None) != (options.std is None):
        raise ValueError("give both --mean and --std, or neither")
    if options.mean is not None:
        config = replace(config, mean=tuple(options.mean), std=tuple(options.std))
    if options.batch_size is not None:
        config = replace(config, batch_size=options.batch_size)
    return config if options.iterations is None else config.with_iterations(options.iterations)


def _invert(options: argparse.Namespace) -> int:
    from kdkernels.cli._pictures import save_curves, save_grid
    from kdkernels.distillation import ImagePool
    from kdkernels.distillation.data_free import balanced_labels, batch_generator, progress_bar

    teacher, config, shape = _trained(options), _inversion(options), tuple(options.image_shape)
    classes = torch.arange(outputs_of(teacher, shape))
    if options.classes is not None:
        wrong = [c for c in options.classes if not 0 <= c < len(classes)]
        if wrong:
            raise ValueError(f"--classes {wrong}: the network has the classes 0 to {len(classes) - 1}")
        classes = torch.tensor(options.classes)
    inverter = DeepInversion(teacher, shape, config)
    run = {"inversion": asdict(config), "seed": options.seed, "image_shape": shape, "classes": classes.tolist()}
    claim_folder(options.output, run | {"teacher": fingerprint(teacher)})
    pool = ImagePool(options.output / "images")
    for index in range(len(pool), options.batches):
        generator = batch_generator(options.seed, index)
        labels = classes[balanced_labels(config.batch_size, len(classes), generator)]
        with progress_bar(config, f"batch {index + 1} of {options.batches}", True) as advance:
            result = inverter.synthesize(labels, generator, progress=advance)
        save_grid(options.output / f"grid_{index:05d}.png", result.images[:256], mean=config.mean, std=config.std)
        save_curves(options.output / f"curves_{index:05d}.png", {"terms of the loss": result.history}, "iteration")
        (options.output / f"history_{index:05d}.json").write_text(json.dumps(result.history))
        pool.add(result.images, result.labels)  # last: a batch that is in the pool is complete
    print(f"{len(pool)} batches of {config.batch_size} images are in {options.output / 'images'}, pictures beside them")
    return 0


def _distill(options: argparse.Namespace) -> int:
    from kdkernels.cli._pictures import save_curves, save_grid
    from kdkernels.distillation import DataFreeConfig, data_free_distill

    teacher, inversion, shape = _trained(options), _inversion(options), tuple(options.image_shape)
    torch.manual_seed(options.seed)
    student = load_model(options.student_model, options.student_model_args)
    if options.student_checkpoint is not None:
        load_weights(student, options.student_checkpoint)
    student = student.to(options.device)
    num_classes = outputs_of(teacher, shape)
    if outputs_of(student, shape) != num_classes:
        raise ValueError(f"teacher and student tell {num_classes} and {outputs_of(student, shape)} classes apart")
    config = DataFreeConfig(
        rounds=options.rounds,
        batches=options.batches,
        epochs=options.epochs,
        batch_size=options.student_batch_size,
        learning_rate=options.learning_rate,
        temperature=options.temperature,
    )
    pool, history = data_free_distill(
        teacher, student, shape, num_classes, inversion, config, seed=options.seed, folder=options.output
    )
    weights = options.output / "student.safetensors"
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous().cpu() for name, tensor in student.state_dict().items()}, weights)
    save_grid(options.output / "grid.png", pool.images[:256], mean=inversion.mean, std=inversion.std)
    save_curves(options.output / "curves.png", {"student's loss": {"loss": history["loss"]}}, "epoch")
    (options.output / "history.json").write_text(json.dumps(history))
    print(f"the student is {weights}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from kdkernels.cli._benchmark import benchmark

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device")
    if options.threads:
        torch.set_num_threads(options.threads)
    one = workload(options.op, options.shape, _DTYPES[options.dtype], options.variant)
    print(benchmark(one, options.device, compiles=not options.no_compile))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from kdkernels.testing import selftest

    info = _loader.build_info()
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
            f"self-test on {device}: {len(report.rows)} results against the float64 reference, "
            f"{len(report.failures)} failed; nearest to its bound: {worst.name}, {worst.ours:.1f} units in the last "
            f"place (eager PyTorch {worst.eager:.1f})"
        )
        for row in report.failures:
            print(f"  FAILED {row.name}: {row.ours:.1f} units in the last place, eager PyTorch {row.eager:.1f}")
    return 1 if failed else 0
