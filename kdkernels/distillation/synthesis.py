"""Batches of a run of DeepInversion: their labels and seeds, their progress, and whether they worked."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from kdkernels.distillation.distill import accuracy
from kdkernels.inversion import DeepInversion, InversionConfig, Synthesis
from kdkernels.inversion._loop import DEAD

WEIGHTS = {"features": "feature_weight", "compete": "compete_weight"}  # of the terms not called like their weight
NO_TERMS = {"loss", DEAD}
DROWNED = 100.0
FEW = 0.5


def batch_generator(seed: int, index: int) -> torch.Generator:
    """Return the generator of a batch, which depends on nothing but the seed and the index."""
    return torch.Generator().manual_seed((int(seed) * 1_000_003 + index) % 2**63)


def balanced_labels(index: int, batch_size: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """Return the labels of a batch of a run, in random order.

    The classes go round: each batch begins with the class after the last of the batch before. After any number of
    batches the counts of the classes differ by at most one.

    Args:
        index: Number of the batch in the run, from 0.
        batch_size: Images in each batch.
        num_classes: Number of classes.
        generator: Generator of the order.

    """
    labels = torch.arange(index * batch_size, (index + 1) * batch_size) % num_classes
    return labels[torch.randperm(batch_size, generator=generator)]


def synthesize_batch(
    inverter: DeepInversion, index: int, *, seed: int, classes: Sequence[int] | None = None, progress: bool = True
) -> tuple[Synthesis, float]:
    """Synthesize a batch of a run, and report whether it worked.

    Args:
        inverter: What synthesizes it.
        index: Number of the batch in the run, from 0; with the seed it decides labels and random numbers.
        seed: Seed of the run.
        classes: Classes to synthesize; all by default.
        progress: Whether to show a progress bar and print the share.

    Returns:
        The batch, and the share of its images that the teacher recognizes.

    """
    config, generator = inverter.config, batch_generator(seed, index)
    chosen = torch.tensor(range(inverter.num_classes) if classes is None else classes)
    labels = chosen[balanced_labels(index, config.batch_size, len(chosen), generator)]
    with progress_bar(config, f"batch {index + 1}", progress) as advance:
        result = inverter.synthesize(labels, generator=generator, progress=advance)
    share = accuracy(inverter.teacher, result.images, result.labels)
    if progress:
        tqdm.write(f"batch {index + 1}: the teacher recognizes {share:.0%} of the images")
    reason = drowned(result.history, share)
    if reason is not None:
        warnings.warn(f"batch {index + 1}: {reason}", stacklevel=2)
    return result, share


def drowned(history: Mapping[str, Sequence[float]], share: float) -> str | None:
    """Say which term of the loss keeps the teacher from recognizing the images; None if none does."""
    last = {name: abs(values[-1]) for name, values in history.items() if name not in NO_TERMS}
    if share >= FEW or "cross_entropy" not in last:
        return None
    cross_entropy = last.pop("cross_entropy")
    name = max(last, key=lambda name: last[name], default="")
    if not name or last[name] <= DROWNED * cross_entropy:
        return None
    return (
        f"the teacher recognizes {share:.0%} of the images, and the weighted term {name!r} ({last[name]:.4g}) drowns "
        f"the cross-entropy ({cross_entropy:.4g}); choose a smaller {WEIGHTS.get(name, name)}"
    )


@contextmanager
def progress_bar(
    config: InversionConfig, description: str, enabled: bool
) -> Iterator[Callable[[int, dict[str, Tensor]], None]]:
    """Show a progress bar for a synthesis; yield the function to call after every iteration."""
    total = sum(stage.iterations for stage in config.stages)
    with tqdm(total=total, desc=description, unit="it", disable=not enabled, mininterval=0.5) as bar:

        def advance(iteration: int, terms: dict[str, Tensor]) -> None:
            if enabled and iteration % 20 == 0:  # reading the loss waits for the device
                bar.set_postfix(loss=f"{terms['loss'].item():.3f}", refresh=False)
            bar.update()

        yield advance
