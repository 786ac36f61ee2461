"""What was recorded in a forward, by layer and use."""

import threading
import weakref
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels.inversion._recomputation import in_first_run


class LayerUse(NamedTuple):
    """A layer, and which of its uses in a forward, counted from 0."""

    layer: str
    use: int


class Record(NamedTuple):
    """The statistics of a use of a layer."""

    layer: int
    use: int
    values: int  # of which each number is the mean or variance
    mean: Tensor  # [C], or [N, C] where images are told apart
    var: Tensor
    targets: tuple[Tensor, Tensor] | None  # where they may change after the layer ran
    part: int = 0  # of the batch, in the order of the parts


class Forward:
    """The records of a forward.

    Args:
        known: Whether its beginning and end are known, because it is a call of the network itself.
        mark: The mark of its replicas, if ``DataParallel`` runs the network, which is not called itself then.

    """

    def __init__(self, known: bool, mark: "Mark | None" = None) -> None:
        self.known = known
        self.mark = mark
        self.failed = False
        self.with_grad = torch.is_grad_enabled()
        self.compiled_without_grad = False  # whether a layer ran so in a forward with gradients
        self.ended = mark is not None
        self.records: list[Record] = []
        self.repeated: list[int] = []  # layers that ran again where it is not known whether in this forward
        self.uses: dict[int, int] = {}  # so far, by layer
        # The same for replicas, which are layers of their own; None unless there are some
        self.replica_uses: weakref.WeakKeyDictionary[nn.Module, int] | None = None

    def number_use(self, layer: int) -> int:
        """Count a use of a layer and return its number."""
        use = self.uses.get(layer, 0)
        self.uses[layer] = use + 1
        if use > 0 and not self.known and layer not in self.repeated:
            self.repeated.append(layer)
        return use

    def number_use_of_replica(self, replica: nn.Module) -> int:
        """Count a use of a replica, which is one of the same use of its layer on a part of the batch."""
        if self.replica_uses is None:
            self.replica_uses = weakref.WeakKeyDictionary()
        use = self.replica_uses.get(replica, 0)
        self.replica_uses[replica] = use + 1
        return use

    def read(self, names: list[str], unbiased: bool, uses: Literal["all", "last"]) -> list[Record]:
        """Return the records that count, one of each use of a layer.

        Args:
            names: Names of the layers.
            unbiased: Whether the variances are divided by n - 1.
            uses: Uses of a layer that count.

        Raises:
            RuntimeError: If there are none, or they are not those of one whole forward.

        """
        if in_first_run():
            raise RuntimeError(
                "the loss is read inside of what torch.utils.checkpoint runs with use_reentrant=True, where it has no "
                "gradient; read it outside, or use use_reentrant=False"
            )
        if self.compiled_without_grad:
            raise RuntimeError(
                "layers ran without gradients in compiled code, where torch.no_grad() and torch.utils.checkpoint with "
                "use_reentrant=True cannot be told apart; use use_reentrant=False, or do not compile this part"
            )
        if self.failed:
            raise RuntimeError("the latest forward ended in an error, so that it has no loss; call the model again")
        if self.repeated:
            self.ended = True
            repeated = ", ".join(names[layer] for layer in self.repeated)
            raise RuntimeError(
                f"{repeated} ran twice outside a call of the model, in one forward or in two, which cannot be told; "
                "call the model itself, read the loss after each forward, or mark one by `with statistics.forward():`"
            )
        if not self.records:
            raise RuntimeError(
                "no BatchNorm layer has run yet; call the model inside the with block first. (The layers of an "
                "exported network do not run; use the original network.)"
            )
        if not self.known:
            self.ended = True
        records = merged(self.records, unbiased) if self.replica_uses is not None else self.records
        if uses == "all":
            return records
        last = {record.layer: record for record in records}
        return [record for record in records if record is last[record.layer]]


def merged(records: list[Record], unbiased: bool) -> list[Record]:
    """Return one record of each use, of the whole batch, from those of its parts; differentiable."""
    groups: dict[tuple[int, int], list[Record]] = {}
    for record in sorted(records, key=lambda record: record.part):
        groups.setdefault((record.layer, record.use), []).append(record)
    return [_merge(parts, unbiased) for parts in groups.values()]


def _merge(parts: list[Record], unbiased: bool) -> Record:
    if len(parts) == 1:
        return parts[0]
    device = parts[0].mean.device
    if parts[0].mean.dim() == 2:
        mean, var = (torch.cat([getattr(part, name).to(device) for part in parts]) for name in ("mean", "var"))
        return parts[0]._replace(mean=mean, var=var)
    shares = [part.values / sum(p.values for p in parts) for part in parts]
    count = sum(part.values for part in parts)
    means, variances = ([getattr(part, name).to(device) for part in parts] for name in ("mean", "var"))
    mean = torch.stack([share * m for share, m in zip(shares, means, strict=True)]).sum(0)
    squares = [
        (part.values - int(unbiased)) * var + part.values * (m - mean).square()
        for part, var, m in zip(parts, variances, means, strict=True)
    ]
    var = torch.stack(squares).sum(0) / (count - int(unbiased))
    return parts[0]._replace(values=count, mean=mean, var=var)


class Mark:
    """What replicas of the same forward have in common. A copy of it has a copy of the owner."""

    def __init__(self, owner: object) -> None:
        self.owner = owner


class Replicas:
    """Tells which forward a replica of ``DataParallel`` belongs to.

    A replica has the attributes that its module had when it was made, and all replicas of a forward are made before
    the first of them runs. If the modules get another mark then, replicas have the same mark if their forward is the
    same. A copy of a network has a copy of the mark, which is another one. The replicas of a module are made in the
    order of the parts of the batch, and numbered.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.name = f"_mark_of_statistics_{id(self)}"
        self.owner = object()
        self.mark = Mark(self.owner)

    def number(self) -> None:
        """Number the replicas that are made from now on."""
        for module in self.modules:
            module.__dict__.setdefault(_REPLICATE, Replication(module)).users += 1

    def renew(self) -> None:
        """Give the modules another mark."""
        self.mark = Mark(self.owner)
        for module in self.modules:
            module.__dict__[self.name] = self.mark

    def remove(self) -> None:
        """Take marks and numbers away."""
        for module in self.modules:
            module.__dict__.pop(self.name, None)
            replication = module.__dict__[_REPLICATE]
            replication.users -= 1
            if replication.users == 0:
                del module.__dict__[_REPLICATE]

    def mark_of(self, replica: nn.Module) -> Mark | None:
        """Return the mark of a replica, or None if it is of another network."""
        mark: Mark | None = replica.__dict__.get(self.name)
        return mark if mark is not None and mark.owner is self.owner else None


_REPLICATE = "_replicate_for_data_parallel"  # the method that DataParallel calls
_NUMBER = "_number_of_replica"


class Replication:
    """Makes the replicas of a module in place of its own method, and numbers them. A copy of it is of the copy."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.users = 0
        self.made = 0

    def __call__(self) -> nn.Module:
        replica: nn.Module = getattr(type(self.module), _REPLICATE)(self.module)
        self.made += 1
        replica.__dict__[_NUMBER] = self.made
        return replica


def number_of(replica: nn.Module) -> int:
    """Return the number of a replica, larger than those of the parts before it."""
    number: int = replica.__dict__[_NUMBER]
    return number


def is_replica(module: nn.Module) -> bool:
    """Tell whether a module is a copy that DataParallel made for one forward."""
    return getattr(module, "_is_replica", False)


lock = threading.Lock()
