"""Statistics of every BatchNorm layer in a forward, and their distance from the running statistics."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Self

from torch import Tensor, nn

from kdkernels.inversion._distances import Distances, Numbers
from kdkernels.inversion._forwards import LayerUse
from kdkernels.inversion._layers import At, Layers, find_layers, weights_of
from kdkernels.inversion._moments import Over, Reported
from kdkernels.inversion._recording import Recording
from kdkernels.inversion._targets import Targets
from kdkernels.ops._checks import check_choice
from kdkernels.ops._types import ChannelReduction, Mode, Moment


class BatchNormStatistics:
    r"""Context manager that compares the statistics of a network's BatchNorm layers with their running statistics.

    Inside the context, every BatchNorm layer reports the mean and variance of its input. They are computed in the
    layer's own pass over it, together with the addition and the activation that follow, where these are found
    (:func:`kdkernels.functional.batch_norm_act_stats`), and otherwise in a pass whose backward is fused into the
    network's (:func:`kdkernels.functional.batch_norm_tap`). :meth:`loss` sums their distances from the running
    statistics:

    .. math:: R = \sum_l w_l \bigl(\lVert \mu_l - m_l \rVert_2 + \lVert v_l - r_l \rVert_2\bigr)

    for ``mode="l2"``; see :func:`kdkernels.functional.batch_norm_stat_loss` for the other modes, the reduction over the
    channels and the weights of mean and variance.

    The records belong to a forward. A call of the network begins one, and :meth:`loss` is that of the latest; a loss
    stays valid when another forward follows. Where the network is run by something else than a call of it, as in
    ``model.forward_features(x)``, reading the loss ends the forward; if a layer ran twice before, it cannot be told
    whether in one forward or in two, and :meth:`loss` raises. :meth:`forward` marks one. A layer that does not run
    does not count, and one that runs under ``torch.no_grad()`` counts as a constant.

    The parts of a batch in ``DataParallel`` are merged. Activation checkpointing of both kinds is supported if the
    backward runs inside the ``with`` block; with ``use_reentrant=True`` it must be one backward of output and loss.

    What follows a layer is found in the graph that ``torch.fx`` makes of the network, or of the largest of its parts
    that have one. A graph is used after its output and statistics agreed with the network's own, for the first input of
    each kind of call, up to half of the digits; both are run for that without gradients, and leave no trace. Where
    there is no graph, a layer is still fused with its statistics. ``torch.compile`` uses the graphs that eager calls in
    the ``with`` block have found. :meth:`describe` says what was found.

    What is known of published recipes without a complete preset: SRe2L (arXiv 2306.13092) weights the loss by 0.01 and
    the first layer by 10, ``0.01 * statistics.loss([10.0] + [1.0] * (len(statistics.layers) - 1))``; federated
    inversion (NVlabs/DeepInversion) compares single images or small batches with the ``targets`` of
    :func:`demixed_targets`, weighted by 0.1; Fast-Datafree (arXiv 2112.06253) has ``ema=0.9``.

    Args:
        model: Network with BatchNorm layers that keep running statistics. A frozen batch normalization, or any other
            module with a ``running_mean`` and ``running_var`` for each channel, counts as one.
        mode: Distance: ``"l2"``, ``"l1"``, ``"squared"`` or ``"gaussian_kl"``.
        moment: Second moment to compare: ``"var"`` or ``"std"``.
        reduction: ``"mean"`` (the default) or ``"sum"`` over the channels, for all modes but l2, which is a norm.
        mean_weight: Weight of the mean's part of the distance, for all modes but gaussian_kl.
        var_weight: Weight of the other part, for all modes but gaussian_kl.
        unbiased: Whether the variance of the images is divided by n - 1.
        over: What a mean and variance are taken over: the ``"batch"``; each ``"image"``, whose distances are averaged;
            or the images of each ``"class"`` in the batch, whose distances are averaged. Classes need the labels:
            ``loss(labels=labels)``. A layer must then have one row for each image. Where an image has a single value
            for each channel, as in BatchNorm1d, its variance is 0, by which gaussian_kl divides: leave such layers out.
        targets: Statistics to compare with instead of the running statistics, (mean, var) by name of the layer, [C]
            each; layers that are not named keep theirs. With ``over="class"`` also [classes, C], a row for each label.
        ema: Share a of a moving average in what is compared: :math:`(1-a)\mu + a\bar\mu`, and the same of the variance,
            where :math:`\bar\mu` is a constant; gradients are scaled by 1 - a. Until the first :meth:`update_ema`
            there is none. For ``over="batch"``.
        layers: Layers to count: a list of names, a type or a tuple of types, or a function of name and module. By
            default all; ``torch.nn.BatchNorm2d`` leaves BatchNorm1d out, as the published code does.
        uses: Uses of a layer that runs several times in a forward: ``"all"`` count, or the ``"last"``, as in the
            published code.
        at: Whether the statistics are those of the layers' ``"input"``, or of their ``"output"``, which are compared
            with what the layer makes of its running statistics: mean bias, variance weight^2 running_var /
            (running_var + eps). Outputs are those of torch's own layers in eval mode, and are copied.
        freeze: Whether to hold the network in eval mode with frozen parameters. Otherwise it is left as it is and
            gradients reach the parameters; the running statistics are those from before the layer's forward.
        fuse: ``"auto"``, or False to run the network's own layers and tap their inputs. Only frozen networks are fused,
            and only for ``at="input"``.

    Attributes:
        layers: Names of the layers in the order of ``model.modules()``, which is also the order of the weights.

    Raises:
        TypeError: If ``layers`` or ``targets`` is not one of these.
        ValueError: If the model has no BatchNorm layer, or one without running statistics, or an argument is not
            accepted.

    Warns:
        UserWarning: If modules that look like a BatchNorm layer are not counted; it names them.

    On exit the network is what it was before: modes, through its own ``train()`` and ``eval()``, parameters, buffers,
    hooks and classes. Source: Yin et al., "Dreaming to Distill", arXiv 1912.08795.

    Example:
        >>> teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> images = torch.randn(4, 3, 8, 8, requires_grad=True)
        >>> with BatchNormStatistics(teacher) as statistics:
        ...     features = teacher(images)
        ...     (features.mean() + 10 * statistics.loss()).backward()
        >>> list(statistics.layers)
        ['1']

    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: Mode = "l2",
        moment: Moment = "var",
        reduction: ChannelReduction | None = None,
        mean_weight: float = 1.0,
        var_weight: float = 1.0,
        unbiased: bool = False,
        over: Over = "batch",
        targets: Targets | None = None,
        ema: float | None = None,
        layers: Layers | None = None,
        uses: Literal["all", "last"] = "all",
        at: At = "input",
        freeze: bool = True,
        fuse: Literal["auto", False] = "auto",
    ) -> None:
        check_choice("uses", uses, ("all", "last"))
        check_choice("at", at, ("input", "output"))
        if fuse != "auto" and fuse is not False:
            raise ValueError(f"fuse is {fuse!r}; accepted are 'auto' and False")
        self.model = model
        self.mode: Mode = mode
        self.moment: Moment = moment
        self.unbiased = unbiased
        self.over: Over = over
        self.uses = uses
        self.at: At = at
        self.freeze = freeze
        self.fuse = fuse
        found = find_layers(model, layers, at)
        self.layers = list(found)
        self._distances = Distances(
            found,
            over=over,
            unbiased=unbiased,
            at=at,
            fixed=freeze,
            targets=targets,
            ema=ema,
            options={
                "mode": mode,
                "moment": moment,
                "reduction": reduction,
                "mean_weight": mean_weight,
                "var_weight": var_weight,
            },
        )
        self._weights = Numbers()
        reported = Reported.for_comparison(over, unbiased)
        self._recording = Recording(
            model, found, reported=reported, uses=uses, at=at, freeze=freeze, fuse=fuse == "auto"
        )

    def __enter__(self) -> Self:
        self._recording.start()
        self._distances.forget_running()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._recording.stop()
        self._distances.forget_running()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Mark what runs inside the ``with`` block as one forward, for a network that is not run by calling it."""
        with self._recording.forward():
            yield

    def describe(self) -> str:
        """Return a text that says, for each layer, what it is fused with, what it is not fused with, and why.

        What is found in the graph of the network is known after the first forward in the ``with`` block.
        """
        return self._recording.describe()

    def losses(self, *, labels: Tensor | None = None) -> dict[LayerUse, Tensor]:
        """Return the distance of each use of a layer in the latest forward, in the order in which they ran.

        The keys are (name of the layer, number of the use, counted from 0); the sum of the values is :meth:`loss`.

        Args:
            labels: See :meth:`loss`.

        Raises:
            RuntimeError: If the model was not called inside the ``with`` block, or it cannot be told which of the
                records belong to one forward.
            TypeError: If labels are not a tensor.
            ValueError: If labels are missing, not used, or not [N] of int64, or a layer has not one row for each image.

        """
        records = self._recording.read()
        losses = self._distances.of(records, labels)
        return dict(zip(map(self._distances.use_of, records), losses.unbind(), strict=True))

    def loss(
        self, weights: Sequence[float] | Mapping[str, float] | None = None, *, labels: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum over the uses of layers in the latest forward.

        Args:
            weights: One weight for each of :attr:`layers`, or weights by name, 1 for the layers that are not named; all
                1 by default.
            labels: Label of each image, [N] of int64, for ``over="class"`` alone. Any numbers tell classes apart;
                targets with a row for each class are read at them.

        Raises:
            RuntimeError, TypeError: See :meth:`losses`.
            ValueError: If the number of weights differs from the number of layers, or a name is not that of a layer;
                see also :meth:`losses`.

        """
        records = self._recording.read()
        losses = self._distances.of(records, labels)
        if weights is None:
            return losses.sum()
        of_layers = weights_of(weights, self.layers)
        return (losses * self._weights.like(losses, [of_layers[record.layer] for record in records])).sum()

    def update_ema(self) -> None:
        """Make the moving average what the latest forward compares: its statistics with the former average mixed in.

        The first call takes the statistics themselves. Fast-Datafree calls it once for each batch of images, after the
        last iteration. The average outlives the ``with`` block.

        Raises:
            RuntimeError: See :meth:`losses`.
            ValueError: If there is no moving average, since ``ema`` is None.

        """
        self._distances.update_average(self._recording.read())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moving average, to save it: ``"<layer>.<use>.mean"`` and ``".var"``; empty if there is none."""
        average = self._distances.average
        return {} if average is None else average.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue with a moving average from :meth:`state_dict`.

        Raises:
            TypeError: If a value is not a floating-point tensor.
            ValueError: If ``ema`` is None and the state is not empty, or it does not fit the layers.

        """
        average = self._distances.average
        if average is not None:
            average.load_state_dict(state, self._distances.channels)
        elif state:
            raise ValueError("state has a moving average, but ema is None; expected a share such as ema=0.9")
