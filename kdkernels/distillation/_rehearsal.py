"""What is checked before a student is trained: one step of every kind is tried, and leaves no trace."""

from collections.abc import Callable, Collection, Iterable, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

from kdkernels._networks import REFUSALS, as_input_of, check_finite, frozen
from kdkernels.functional import distillation_loss

Batch = Any
Unpack = Callable[[Batch], Tensor | tuple[Tensor, Tensor | None]]


def unpacked(batch: Batch, unpack: Unpack | None) -> tuple[Tensor, Tensor | None]:
    """Return the images and labels of a batch.

    Raises:
        TypeError: If it is neither images, (images,), (images, labels), nor made so by ``unpack``.

    """
    given = batch if unpack is None else unpack(batch)
    parts = (given,) if isinstance(given, Tensor) else given
    if (
        not isinstance(parts, (tuple, list))
        or not 1 <= len(parts) <= 2
        or not isinstance(parts[0], Tensor)
        or not isinstance(parts[-1], (Tensor, type(None)))
    ):
        described = type(given).__name__
        if isinstance(given, dict):
            described = f"a dict with the keys {list(given)}"
        elif isinstance(given, (tuple, list)):
            described += f" of {', '.join(type(part).__name__ for part in given)}"
        source = "loader gave" if unpack is None else "unpack returned"
        raise TypeError(
            f"{source} {described}; expected images, (images,) or (images, labels), as tensors. Pass "
            'unpack=lambda batch: (batch["images"], batch["labels"]), with the names of your batches'
        )
    return parts[0], parts[1] if len(parts) == 2 else None


def length_of(sized: object) -> int | None:
    """Return the length of a loader or a sampler, or None if it does not tell, as that of an iterable dataset."""
    try:
        return len(sized) if isinstance(sized, Sized) else None
    except TypeError:  # a DataLoader has a length only if its dataset or its sampler has one
        return None


def batch_sizes(loader: Iterable[Batch], unpack: Unpack | None) -> set[int]:
    """Return the sizes of the batches that a loader will give, as far as it tells."""
    if isinstance(loader, (list, tuple)) and unpack is None:
        return {len(unpacked(batch, None)[0]) for batch in loader}
    batches = loader.batch_sampler if isinstance(loader, DataLoader) else None
    if type(batches) is not BatchSampler or (count := length_of(batches.sampler)) is None:
        return set()
    whole, rest = divmod(count, batches.batch_size)
    sizes = {batches.batch_size} if whole else set()
    return sizes | ({rest} if rest and not batches.drop_last else set())


def check_networks(student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise unless the optimizer trains the student, and the student alone."""
    check_finite(teacher, "teacher")
    check_finite(student, "student")
    mine, others = dict(student.named_parameters()), dict(teacher.named_parameters())
    places = {_place(tensor) for tensor in (*others.values(), *_running_statistics(teacher).values())}
    trained = mine | _running_statistics(student)
    shared = [name for name, tensor in trained.items() if tensor.numel() and _place(tensor) in places]
    if shared:
        raise ValueError(
            f"student and teacher share the parameters {', '.join(shared[:5])}{' ...' * (len(shared) > 5)}, so the "
            "teacher would change while it is imitated; give the teacher its own with copy.deepcopy(teacher)"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer is LBFGS, whose step computes the loss several times; expected one that steps once for each "
            "loss, such as torch.optim.Adam"
        )
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    wrong = [name for name, parameter in others.items() if id(parameter) in optimized]
    if wrong:
        raise ValueError(f"optimizer holds parameters of the teacher ({wrong[0]}); pass it student.parameters()")
    if not any(id(parameter) in optimized and parameter.requires_grad for parameter in mine.values()):
        raise ValueError(
            "optimizer holds no parameter of the student that requires grad; pass it student.parameters(), after the "
            "student was moved to its device"
        )


def _running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that training changes although no optimizer holds them."""
    return {name: buffer for name, buffer in model.named_buffers() if name.split(".")[-1] == "running_mean"}


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    """Return where the values of a tensor are, which another may share, as after ``load_state_dict(assign=True)``."""
    return tensor.device, tensor.data_ptr()


def check_options(options: dict[str, Any]) -> None:
    """Raise unless :func:`distillation_loss` accepts the options."""
    logits = torch.zeros(1, 2)
    # The default of ``ce_weight`` depends on labels, and a weight needs them.
    labels = None if options["ce_weight"] is None else torch.zeros(1, dtype=torch.int64)
    distillation_loss(logits, logits, labels, **{**options, "dim": None})


def rehearse(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    sizes: Collection[int],
    options: dict[str, Any],
) -> None:
    """Try a training step on the first of some images for each size of a batch; nothing is changed by it.

    Raises:
        ValueError: If a network does not accept a batch, if they do not return logits of the same shape, or if the loss
            does not accept them. Batch normalization, for example, does not accept a batch of one vector in training.

    """
    if len(images) == 0 or 0 in sizes:
        raise ValueError("loader gave a batch without images; drop empty batches")
    student = getattr(student, "_orig_mod", student)  # a step through torch.compile would compile it twice
    if isinstance(student, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        student = student.module  # functional_call does not know them
    modes = [(module, module.training) for module in student.modules()]
    devices = [images.device] if images.device.type != "cpu" else []
    for size in (len(images), *sorted({*sizes} - {len(images)})):
        several = images[:size] if size <= len(images) else images[:1].expand(size, *images.shape[1:])
        try:
            with torch.random.fork_rng(devices, device_type=images.device.type), torch.no_grad():
                with frozen(teacher):
                    target = teacher(as_input_of(teacher, several))
                student.train()
                buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
                output = torch.func.functional_call(student, buffers, (as_input_of(student, several),))
        except REFUSALS as error:
            remedy = ""
            if size < len(images):
                remedy = ". If the last batch is too small, use drop_last=True or another batch size"
            elif images.dtype == torch.uint8:
                remedy = ". They are torch.uint8; convert them as the teacher was trained, such as images.float() / 255"
            raise ValueError(
                f"a batch of {size} images of shape {list(images.shape[1:])} cannot be used for training: "
                f"{str(error) or type(error).__name__}{remedy}"
            ) from error
        finally:
            for module, mode in modes:
                module.training = mode
        for role, logits in (("student", output), ("teacher", target)):
            if not isinstance(logits, Tensor):
                raise ValueError(
                    f"{role} must return logits as a tensor, but returned {type(logits).__name__}; wrap it in a module "
                    "that returns the logits alone"
                )
        if output.shape != target.shape:
            raise ValueError(
                f"student returns logits of shape {list(output.shape)} and teacher of {list(target.shape)}; they must "
                "have the same classes"
            )
    if labels is not None:
        labels = labels.to(output.device)
        output, target = output[: len(images)], target[: len(images)]
    with torch.no_grad():
        distillation_loss(output[: len(images)], target.to(output.device)[: len(images)], labels, **options)
