"""BatchNorm layers in a graph, with what follows them and can be computed in the same pass."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, fx, nn

from kdkernels.inversion._fusion.nodes import IDENTITY, Activation, Nodes, is_in_place
from kdkernels.inversion._fusion.trace import has_hooks


class Fuse(Protocol):
    """Makes the function that a layer is replaced by, of the layer, its input and a residual."""

    def __call__(self, index: int, activation: Activation, number: int) -> Callable[..., Tensor]: ...


@dataclass
class Fused:
    """What was found in a graph.

    Attributes:
        parts: What is computed with each use of a layer, by the number of the layer.
        reasons: Why nothing more is.
        skipped: Modules that are no longer called.

    """

    parts: dict[int, list[str]] = field(default_factory=dict)
    reasons: dict[int, list[str]] = field(default_factory=dict)
    skipped: set[nn.Module] = field(default_factory=set)


def fuse(
    graph: fx.Graph,
    root: nn.Module,
    watched: dict[nn.Module, int],
    plain: Callable[[int], bool],
    make: Fuse,
) -> Fused:
    """Replace layers and what follows them in a graph.

    Args:
        graph: Graph of ``root``, which is changed.
        root: Module whose forward it is.
        watched: Layers and their numbers.
        plain: Tells whether a layer does nothing but normalize.
        make: Makes the functions that take the place.

    """
    found, search = Fused(), _Search(graph, root, watched)
    layers = [node for node in graph.nodes if search.layer_of(node) is not None]
    for number, node in enumerate(layers):
        module = search.modules[node.target]
        index = watched[module]
        if not plain(index):
            continue
        if has_hooks(module):
            found.reasons.setdefault(index, []).append("the layer has hooks")
            continue
        pattern = search.pattern_of(node)
        if pattern.why is not None:
            found.reasons.setdefault(index, []).append(pattern.why)
        if pattern.last is node:
            continue
        # As early as its inputs are there, so that layers run in the order in which they did
        with graph.inserting_before(pattern.add or node):
            layer = graph.create_node("get_attr", node.target)
            inputs = [layer, node.args[0], *([] if pattern.residual is None else [pattern.residual])]
            call = graph.call_function(make(index, pattern.activation, number), tuple(inputs))
        pattern.last.replace_all_uses_with(call)
        for old in reversed([node, *pattern.rest]):
            if old.op == "call_module":
                found.skipped.add(search.modules[old.target])
            graph.erase_node(old)
        part = "BatchNorm" + " + add" * (pattern.residual is not None)
        part += f" + {pattern.activation}" * (pattern.activation.name is not None)
        found.parts.setdefault(index, []).append(part)
    return found


@dataclass
class _Pattern:
    """A layer and what is computed with it.

    Attributes:
        last: Node whose value the whole has.
        add: Node that adds the residual.
        rest: Nodes after the layer.
        why: Why no more of them.

    """

    last: fx.Node
    activation: Activation = IDENTITY
    residual: fx.Node | None = None
    add: fx.Node | None = None
    rest: list[fx.Node] = field(default_factory=list)
    why: str | None = None


class _Search(Nodes):
    """Looks for patterns in a graph."""

    def __init__(self, graph: fx.Graph, root: nn.Module, watched: dict[nn.Module, int]) -> None:
        super().__init__(root, watched)
        self.order = {node: number for number, node in enumerate(graph.nodes)}
        self.containers = {
            name
            for name, module in self.modules.items()
            if module not in watched and any(child in watched for child in module.modules())
        }

    def layer_of(self, node: Any) -> nn.Module | None:
        """Return the layer that a node calls with nothing but its input, or None."""
        module = self.module_of(node)
        one = module in self.watched and len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
        return module if one else None

    def pattern_of(self, layer: fx.Node) -> _Pattern:
        """Return what can be computed with a layer."""
        pattern = _Pattern(layer)
        activation, rest = self.following(layer)
        if isinstance(activation, str):
            pattern.why = activation
        elif activation is not None:
            pattern = _Pattern(rest[-1], activation, rest=rest)
        else:
            self.extend_by_addition(pattern)
        return pattern

    def extend_by_addition(self, pattern: _Pattern) -> None:
        """Add the addition that follows a layer to its pattern, and the activation after it."""
        layer = pattern.last
        add, path = self.next_of(layer)
        added = None if add is None else self.addition_at(add)
        if add is None or added is None:
            end = path[-1] if add is not None and path else layer
            following = ", ".join(dict.fromkeys(str(user) for user in end.users if user.op != "output"))
            pattern.why = f"{following} follows" if following else None
            return
        first, second, in_place = added
        other = second if first is (path[-1] if path else layer) else first
        base = self.layer_before(other)
        if base is not None and self.order[base] > self.order[layer]:
            pattern.why = f"it is the residual of {base.target}"
            return
        if in_place and first is other and base is None:
            pattern.why = "the addition after it changes the other operand in place"
            return
        activation, rest = self.following(add)
        if isinstance(activation, str):
            pattern.why = activation.replace("after it", "after the addition")
            activation = None
        if activation is None:
            activation, rest = IDENTITY, []
        rest = [*path, add, *rest]
        last = rest[-1]
        if activation.name is not None and any(is_in_place(node, last, self) for node in last.users):
            # The derivative of the activation would be taken from an output that is no longer there.
            pattern.why = "the activation after the addition is changed in place"
            activation, rest, last = IDENTITY, [*path, add], add
        why = self.why_not_until(add, layer, other, path)
        if why is not None:
            pattern.why = why
            return
        pattern.last, pattern.rest, pattern.activation = last, rest, activation
        pattern.residual, pattern.add = other, add

    def layer_before(self, node: fx.Node) -> fx.Node | None:
        """Return the layer whose output, used once, a value is."""
        while len(node.users) == 1:
            if self.layer_of(node) is not None:
                return node
            if not self.is_identity(node):
                return None
            node = node.all_input_nodes[0]
        return None

    def why_not_until(self, add: fx.Node, layer: fx.Node, residual: fx.Node, own: list[fx.Node]) -> str | None:
        """Return why a layer may not run as late as the addition."""
        between = layer.next
        while between is not add:
            if between not in own:
                module = self.module_of(between)
                if module in self.watched or between.target in self.containers:
                    return f"{between.target} runs before the addition after it"
                if self.may_change(between, (layer.args[0], residual)):
                    return f"{between} may change its input or the residual in place before they are added"
            between = between.next
        return None

    def may_change(self, node: fx.Node, values: tuple[Any, ...]) -> bool:
        """Tell whether a node may change one of these values in place."""
        module = self.module_of(node)
        if module is not None:
            if type(module).__module__.startswith("torch.nn.") and not getattr(module, "inplace", False):
                return False
        elif not is_in_place(node, None, self):
            return False
        return any(not self.is_new(value) or value in values for value in node.all_input_nodes)

    def is_new(self, node: fx.Node) -> bool:
        """Tell whether a value shares no memory with another."""
        layers = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase)
        return isinstance(self.module_of(node), layers)
