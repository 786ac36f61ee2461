"""Losses of logits whose classes are split over the ranks of a tensor-parallel trainer, which brings the collectives.

A rank turns its shard into statistics of a few numbers a position; the loss is known from those of all ranks, and the
gradient of a shard from the shard and the totals: one round of communication for the two KL divergences and the
cross-entropy, two for the Jensen-Shannon divergence.
"""

from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from kdkernels.ops import _autograd, _checks, _positions, _registry
from kdkernels.ops._numerics import compute_dtype
from kdkernels.ops._types import Reduction
from kdkernels.ops.split_vocabulary import reference

__all__ = ["split_vocabulary_loss", "split_vocabulary_mixture", "split_vocabulary_statistics"]

Divergence = Literal["forward_kl", "reverse_kl", "js"]
_DIVERGENCES = ("forward_kl", "reverse_kl", "js")
_TENSORS = 10
_COUNT = 14
_ARGUMENTS = (
    "Tensor input, Tensor target, Tensor? labels, Tensor? position_weight, Tensor statistics, Tensor? mixture, "
    "Tensor temperature, Tensor divergence_weight, Tensor label_weight, Tensor beta, str divergence, int first_class, "
    "int ignore_index, str reduction"
)


def _fake(input: Tensor, target: Tensor, labels: Tensor | None, weight: Tensor | None, statistics: Tensor,
          *options: Any) -> Tensor:  # fmt: skip
    torch._check(statistics.dim() == input.dim() + 1, lambda: "statistics have the wrong number of dimensions")
    return statistics.new_empty(input.shape[:-1] if options[-1] == "none" else ())


def _backward_fake(grad_output: Tensor, input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    of_input, of_target = options[-2:]
    return input.new_empty(input.shape if of_input else 0), target.new_empty(target.shape if of_target else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[_TENSORS:]
    ctx.save_for_backward(*inputs[:_TENSORS])


def _backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    if grad_loss is None or not any(wanted):
        return (None,) * _COUNT
    grads = _BACKWARD.run(ctx.backend, grad_loss, *ctx.saved_tensors, *ctx.options, *wanted)
    return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * (_COUNT - 2))


def _refuse(*_arguments: Any) -> NoReturn:
    raise NotImplementedError(
        "split_vocabulary_loss has no second derivative: it would need the shards of the other ranks; gather the "
        "logits and call distillation_loss"
    )


def _fake_statistics(input: Tensor, target: Tensor, *_options: Any) -> Tensor:
    return input.new_empty((len(reference.ROWS), *input.shape[:-1]), dtype=compute_dtype(input, target))


def _fake_mixture(input: Tensor, target: Tensor, statistics: Tensor, *_options: Any) -> Tensor:
    return statistics.new_empty((2, *input.shape[:-1]))


_STATISTICS = _registry.define(
    "split_vocabulary_statistics",
    "(Tensor input, Tensor target, Tensor? labels, Tensor temperature, str divergence, int first_class, "
    "int ignore_index) -> Tensor",
    reference=reference.statistics,
    fake=_fake_statistics,
    composed_of="softmax_divergence",
)
_MIXTURE = _registry.define(
    "split_vocabulary_mixture",
    "(Tensor input, Tensor target, Tensor statistics, Tensor temperature, Tensor beta) -> Tensor",
    reference=reference.mixture,
    fake=_fake_mixture,
    composed_of="softmax_divergence",
)
_LOSS = _registry.define(
    "split_vocabulary_loss",
    f"({_ARGUMENTS}) -> Tensor",
    reference=reference.forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    composed_of="softmax_divergence",
)
_BACKWARD = _registry.define(
    "split_vocabulary_loss_backward",
    f"(Tensor grad_output, {_ARGUMENTS}, bool input_gradient, bool target_gradient) -> (Tensor, Tensor)",
    reference=reference.backward,
    fake=_backward_fake,
    backward=_refuse,
    composed_of="softmax_divergence",
)


def _check_shards(input: Tensor, target: Tensor) -> None:
    _checks.check_floating("input", input)
    _checks.check_floating("target", target)
    _checks.check_same_shape("input", input, "target", target)
    _checks.check_same_device("input", input, "target", target)
    if input.dim() == 0 or input.shape[-1] == 0:
        raise ValueError(f"input has shape {tuple(input.shape)}; expected [..., classes of this rank], one or more")


def _check_labels(labels: Tensor | None, input: Tensor, first_class: int) -> None:
    _checks.check_integer("first_class", first_class, minimum=0)
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of class indices, torch.int64, got {got}")
    _checks.check_same_device("input", input, "labels", labels)
    if labels.shape != input.shape[:-1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; expected {tuple(input.shape[:-1])}")


def _scalars(input: Tensor, temperature: float | Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    temperature = _checks.check_scalar("temperature", temperature, input, minimum=0)
    beta = _checks.check_scalar("beta", beta, input, minimum=0, maximum=1)
    if (number := _checks.number_of(beta)) in (0.0, 1.0):
        kind = "forward_kl" if number == 0 else "reverse_kl"
        raise ValueError(f"beta is {number!r}; expected a number between 0 and 1: use divergence={kind!r} instead")
    return _checks.scalar_tensor(temperature, input), _checks.scalar_tensor(beta, input)


def _check_statistics(statistics: Tensor, input: Tensor, name: str = "statistics") -> None:
    _checks.check_floating(name, statistics)
    expected = (len(reference.ROWS), *input.shape[:-1])
    if statistics.dim() != input.dim() + 1 or statistics.shape[1:] != expected or not len(statistics):
        raise ValueError(
            f"{name} has shape {tuple(statistics.shape)}; expected (ranks, {', '.join(map(str, expected))}), the "
            "statistics of every rank stacked"
        )


def split_vocabulary_statistics(
    input: Tensor,
    target: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 4.0,
    divergence: Divergence = "forward_kl",
    first_class: int = 0,
    ignore_index: int = -100,
) -> Tensor:
    r"""Statistics of one rank's shard of the logits, for :func:`split_vocabulary_loss`.

    For each position they are the maximum and the logarithm of the sum of exponentials of both sides' shards at the
    temperature, that of the student's at temperature 1, the logit of the label and whether it lies in the shard, and
    the divergence within the shard. The divergence of whole rows follows from the chain rule
    :math:`\mathrm{KL}(p\,\|\,q) = \mathrm{KL}(P\,\|\,Q) + \sum_k P_k\,\mathrm{KL}(p^k\,\|\,q^k)`, with the masses P
    and Q of the shards and the distributions p^k and q^k within them. Source: Cover and Thomas, "Elements of
    Information Theory", section 2.5.

    Args:
        input: This rank's classes of the student's logits, [..., V / ranks]; fp16, bf16, fp32 or fp64.
        target: The same classes of the teacher's logits.
        labels: Class indices in the whole vocabulary, int64, [...]; the same on every rank.
        temperature: T > 0, a number or a 0-dim tensor without gradient.
        divergence: The divergence to be computed: ``"forward_kl"``, ``"reverse_kl"`` or ``"js"``.
        first_class: Class of the whole vocabulary that the shard begins with; used with labels.
        ignore_index: Label of the positions to leave out.

    Returns:
        A constant tensor [8, ...] in fp32, or fp64 if a side is fp64. A shard without a finite logit has mass 0.

    Raises:
        TypeError, ValueError: An argument is not accepted.

    Example:
        >>> student, teacher = torch.randn(8, 50), torch.randn(8, 50)
        >>> own = split_vocabulary_statistics(student, teacher, temperature=2.0)

    """
    _check_shards(input, target)
    _checks.check_choice("divergence", divergence, _DIVERGENCES)
    _check_labels(labels, input, first_class)
    number, _ = _scalars(input, temperature, 0.5)
    with torch.no_grad():
        sides = input.detach(), target.detach()
        return _STATISTICS.run_on(input.device, *sides, labels, number, divergence, first_class, ignore_index)  # type: ignore[no-any-return]


def split_vocabulary_mixture(
    input: Tensor,
    target: Tensor,
    statistics: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    beta: float | Tensor = 0.5,
) -> Tensor:
    r"""What one rank's shard adds to the two terms of the Jensen-Shannon divergence: its second round.

    With :math:`m = \beta p + (1 - \beta) q` these are the sums of :math:`p (\ln p - \ln m)` and of
    :math:`q (\ln q - \ln m)` over the classes of the shard. Sum them over the ranks (``all_reduce``), and pass the sum
    as ``mixture`` to :func:`split_vocabulary_loss`. Source: Lin, "Divergence measures based on the Shannon entropy",
    1991.

    Args:
        input: This rank's classes of the student's logits.
        target: The same classes of the teacher's logits.
        statistics: Statistics of all ranks, stacked: [ranks, 8, ...]; see :func:`split_vocabulary_statistics`.
        temperature: T > 0, as for the statistics.
        beta: Teacher's share of the mixture, between 0 and 1.

    Returns:
        A constant tensor [2, ...].

    Raises:
        TypeError, ValueError: An argument is not accepted.

    Example:
        >>> student, teacher = torch.randn(8, 50), torch.randn(8, 50)
        >>> every = torch.stack([split_vocabulary_statistics(student, teacher, divergence="js")])
        >>> mixture = split_vocabulary_mixture(student, teacher, every)

    """
    _check_shards(input, target)
    _check_statistics(statistics, input)
    number, share = _scalars(input, temperature, beta)
    with torch.no_grad():
        sides = input.detach(), target.detach(), statistics.detach()
        return _MIXTURE.run_on(input.device, *sides, number, share)  # type: ignore[no-any-return]


def split_vocabulary_loss(
    input: Tensor,
    target: Tensor,
    statistics: Tensor,
    labels: Tensor | None = None,
    *,
    mixture: Tensor | None = None,
    temperature: float | Tensor = 4.0,
    kd_weight: float | Tensor | None = None,
    ce_weight: float | Tensor | None = None,
    divergence: Divergence = "forward_kl",
    beta: float | Tensor = 0.5,
    position_weight: Tensor | None = None,
    first_class: int = 0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r""":func:`distillation_loss` of logits whose classes are split over ranks.

    Every rank calls it with its shard and the statistics of all ranks, and gets the loss of the whole rows. The
    gradient is that of the rank's own shard; nothing else needs to be communicated. Each rank calls ``backward`` on its
    own loss: do not sum the losses, and do not divide by the number of ranks. A trainer with a process group::

        own = split_vocabulary_statistics(student, teacher, labels, temperature=T, first_class=rank * size)
        every = own.new_empty(ranks, *own.shape)
        dist.all_gather_into_tensor(every, own, group=group)
        loss = split_vocabulary_loss(student, teacher, every, labels, temperature=T, first_class=rank * size)
        loss.backward()

    and for the Jensen-Shannon divergence, before the loss, with ``divergence="js"`` in the calls around it::

        mixture = split_vocabulary_mixture(student, teacher, every, temperature=T)
        dist.all_reduce(mixture, group=group)  # then pass mixture=mixture

    Args:
        input: This rank's classes of the student's logits, [..., V / ranks]; fp16, bf16, fp32 or fp64.
        target: The same classes of the teacher's logits.
        statistics: Statistics of all ranks, stacked: [ranks, 8, ...]; see :func:`split_vocabulary_statistics`, which
            takes the same labels, temperature, divergence and ``first_class``.
        labels: Class indices in the whole vocabulary, int64, [...].
        mixture: Sum over the ranks of :func:`split_vocabulary_mixture`; for ``"js"`` only.
        temperature: T > 0, a number or a 0-dim tensor without gradient.
        kd_weight: Weight of the divergence, as in :func:`distillation_loss`.
        ce_weight: Weight of the cross-entropy, as in :func:`distillation_loss`.
        divergence: ``"forward_kl"``, ``"reverse_kl"``, or ``"js"`` with ``beta``.
        beta: Teacher's share of the mixture of ``"js"``, between 0 and 1.
        position_weight: Weight of each position, boolean or floating-point, [...]. A position of weight 0 counts for
            nothing, even if its logits are NaN.
        first_class: Class of the whole vocabulary that the shard begins with.
        ignore_index: Label of the positions to leave out.
        reduction: ``"none"``, ``"mean"``, ``"sum"`` or ``"batchmean"``, as in :func:`distillation_loss`.

    Returns:
        The loss in fp32 or fp64, equal on all ranks. Gradients flow to both sides' shards. There are no second
        derivatives. Special values are those of :func:`kl_div_with_logits`. Source: Hinton, Vinyals and Dean, arXiv
        1503.02531.

    Raises:
        TypeError, ValueError: An argument is not accepted; or the statistics are those of other logits or of another
            temperature, which the first position shows (on a GPU only if :func:`kdkernels.set_debug` is on).
        IndexError: No rank has the class of a label. On a GPU the loss is NaN instead, unless
            :func:`kdkernels.set_debug` is on.

    Example:
        >>> student, teacher = torch.randn(8, 50, requires_grad=True), torch.randn(8, 50)
        >>> every = torch.stack([split_vocabulary_statistics(student, teacher)])  # of a single rank
        >>> split_vocabulary_loss(student, teacher, every).backward()

    """
    _check_shards(input, target)
    _check_statistics(statistics, input)
    _checks.check_choice("divergence", divergence, _DIVERGENCES)
    _checks.check_choice("reduction", reduction, _positions.REDUCTIONS)
    _check_labels(labels, input, first_class)
    if (mixture is None) == (divergence == "js"):
        raise ValueError(
            "divergence='js' needs mixture, the sum over the ranks of split_vocabulary_mixture"
            if mixture is None
            else f"mixture belongs to divergence='js', but divergence is {divergence!r}; leave it out"
        )
    if labels is None and ce_weight is not None and (number := _checks.number_of(ce_weight)) != 0:
        raise ValueError(f"ce_weight is {number!r}, but there are no labels; pass labels or leave it out")
    if labels is not None and (kd_weight is None) != (ce_weight is None):
        given = "ce_weight" if kd_weight is None else "kd_weight"
        raise ValueError(f"{given} alone was given; with labels give both kd_weight and ce_weight, or neither")
    kd_weight = (1.0 if labels is None else 0.9) if kd_weight is None else kd_weight
    ce_weight = (0.0 if labels is None else 0.1) if ce_weight is None else ce_weight
    number_t, share = _scalars(input, temperature, beta)
    of_divergence = _checks.scalar_tensor(_checks.check_scalar("kd_weight", kd_weight, input), input)
    of_labels = _checks.scalar_tensor(_checks.check_scalar("ce_weight", ce_weight, input), input)
    if mixture is not None:
        _checks.check_floating("mixture", mixture)
        if mixture.shape != (2, *input.shape[:-1]):
            raise ValueError(
                f"mixture has shape {tuple(mixture.shape)}; expected {(2, *input.shape[:-1])}, its sum over the ranks"
            )
        mixture = _autograd.savable(mixture.detach())
    weight = _positions.checked_position_weight(position_weight, input, input.shape[:-1], statistics.dtype)
    labels = None if labels is None else _autograd.savable(labels)
    tensors = (_autograd.savable(input), _autograd.savable(target), labels, weight)
    return _LOSS.run_on(  # type: ignore[no-any-return]
        input.device, *tensors, _autograd.savable(statistics.detach()), mixture, number_t,
        of_divergence * number_t * number_t, of_labels, share, divergence, first_class, ignore_index, reduction,
    )  # fmt: skip
