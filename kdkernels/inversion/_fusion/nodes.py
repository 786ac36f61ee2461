"""What the nodes of a graph compute, as far as it can be fused with a BatchNorm layer."""

import inspect
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from kdkernels.inversion._fusion.trace import ONE_TENSOR, NotTraced, has_hooks, trace, why_opaque


class Activation(NamedTuple):
    """An activation that can be computed with the layer before it; None stands for the identity."""

    name: str | None
    negative_slope: float = 0.01

    def __str__(self) -> str:
        return _TITLES[self.name] if self.name else "no activation"

    def __call__(self, input: Tensor) -> Tensor:
        """Return the activation of a tensor."""
        if self.name is None:
            return input
        if self.name == "leaky_relu":
            return F.leaky_relu(input, self.negative_slope)
        return getattr(F, self.name)(input)  # type: ignore[no-any-return]


IDENTITY = Activation(None)
_TITLES = {"relu": "ReLU", "relu6": "ReLU6", "leaky_relu": "LeakyReLU", "silu": "SiLU", "hardswish": "Hardswish"}
_MODULES: dict[Any, str] = {
    nn.ReLU.forward: "relu",
    nn.SiLU.forward: "silu",
    nn.Hardswish.forward: "hardswish",
}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.hardtanh: "hardtanh",
    F.hardtanh_: "hardtanh",
}
_METHODS = {"relu": "relu", "relu_": "relu"}
_DROPOUTS = (nn.modules.dropout._DropoutNd,)
_DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_RANDOM_DEPTH = ("stochastic_depth", "drop_path")  # of torchvision and timm, if recorded as one call
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_IN_PLACE = {getattr(operator, name) for name in dir(operator) if name.startswith("i") and name[1:] in dir(operator)}
_IN_PLACE |= {operator.setitem, operator.delitem, operator.imatmul}


def activation_of(module: nn.Module) -> Activation | None:
    """Return the activation that a module is, :data:`IDENTITY` for the identity, or None for something else."""
    forward = type(module).forward
    if forward in _MODULES:
        return Activation(_MODULES[forward])
    if forward is nn.LeakyReLU.forward:
        return Activation("leaky_relu", float(module.negative_slope))  # type: ignore[arg-type]
    if forward is nn.Hardtanh.forward:  # of ReLU6 too
        return Activation("relu6") if module.min_val == 0 and module.max_val == 6 else None
    if forward is nn.Identity.forward or (isinstance(module, _DROPOUTS) and not module.training):
        return IDENTITY
    if type(module).__module__.split(".")[0] == "torch" or any(True for _ in module.parameters()):
        return None
    return _traced_activation(module)


def _traced_activation(module: nn.Module) -> Activation | None:
    """Return the activation that a user's module computes, such as one that drops paths while training."""
    inside = {child for child in module.modules() if type(child).__module__.split(".")[0] != "torch"}
    if any(has_hooks(child) or why_opaque(child) for child in inside):
        return None
    try:
        graph = trace(module, ONE_TENSOR, inside)
    except NotTraced:
        return None
    first, *nodes, output = graph.nodes
    if not nodes:
        return IDENTITY if output.args[0] is first else None
    activation, rest = Nodes(module, {}).following(first)
    if activation is None and all(map(Nodes(module, {}).is_identity, rest)):
        activation = IDENTITY
    whole = isinstance(activation, Activation) and rest == nodes and output.args[0] is nodes[-1]
    return activation if whole else None  # type: ignore[return-value]


class Nodes:
    """The nodes of a graph.

    Attributes:
        modules: Modules by the names that nodes call them by.
        watched: Layers and their numbers.

    """

    def __init__(self, root: nn.Module, watched: dict[nn.Module, int]) -> None:
        self.modules = dict(root.named_modules())
        self.watched = watched
        self._activations: dict[nn.Module, Activation | None] = {}

    def known(self, module: nn.Module) -> Activation | None:
        """Return :func:`activation_of` of a module."""
        if module not in self._activations:
            self._activations[module] = activation_of(module)
        return self._activations[module]

    def module_of(self, node: Any) -> nn.Module | None:
        return self.modules[node.target] if isinstance(node, fx.Node) and node.op == "call_module" else None

    def following(self, node: fx.Node) -> tuple[Activation | str | None, list[fx.Node]]:
        """Return the activation of a value that nothing else uses, and its nodes; why not; or None if there is none."""
        user, path = self.next_of(node)
        if user is not None:
            return self.activation_at(user), [*path, user]
        end = path[-1] if path else node
        gate, product = [*end.users, None, None][:2]
        if gate is not None and product is not None and len(end.users) == 2:  # x * sigmoid(x)
            sigmoid = gate.target in (torch.sigmoid, F.sigmoid, "sigmoid") or isinstance(
                self.module_of(gate), nn.Sigmoid
            )
            both = set(product.args) == {end, gate} and len(product.args) == 2 and not product.kwargs
            if sigmoid and both and list(gate.users) == [product] and product.target in _PRODUCTS:
                return Activation("silu"), [*path, gate, product]
        return None, path

    def next_of(self, node: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
        """Return the only user of a value, if it has one, and the identities before it."""
        path: list[fx.Node] = []
        while len(node.users) == 1:
            (user,) = node.users
            if user.op == "output":
                break
            if not self.is_identity(user):
                return user, path
            path.append(user)
            node = user
        return None, path

    def is_identity(self, node: fx.Node) -> bool:
        module = self.module_of(node)
        if module is not None:
            return self.known(module) is IDENTITY and not has_hooks(module) and why_not_skipped(module) is None
        if node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            if node.target in _DROPOUT_FUNCTIONS or name in _RANDOM_DEPTH:
                return argument_of(node, "training") is False and node.args[:1] == (node.all_input_nodes[0],)
        return False

    def activation_at(self, node: fx.Node | None) -> Activation | str | None:
        """Return the activation that a node computes, or why it is left alone, or None if it is none."""
        module = self.module_of(node)
        if module is not None and module not in self.watched:
            activation = self.known(module)
            if activation is None:
                return None
            if has_hooks(module):
                return "the activation after it has hooks"
            why = why_not_skipped(module)
            return activation if why is None else f"the activation after it {why}"
        name = None
        if node is not None and node.op == "call_function":
            name = _FUNCTIONS.get(node.target)
        elif node is not None and node.op == "call_method":
            name = _METHODS.get(str(node.target))
        if name is None or node is None or len(node.all_input_nodes) != 1:
            return None
        if name == "hardtanh":
            limits = argument_of(node, "min_val", 1, -1.0), argument_of(node, "max_val", 2, 1.0)
            return Activation("relu6") if limits == (0, 6) else None
        slope = argument_of(node, "negative_slope", 1, 0.01) if name == "leaky_relu" else 0.01
        return Activation(name, float(slope)) if isinstance(slope, int | float) else None

    def addition_at(self, node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
        """Return the two values that a node adds and whether the first is changed in place, or None."""
        if node.op == "call_function" and node.target in _ADDITIONS:
            in_place = node.target is operator.iadd
        elif node.op == "call_method" and node.target in ("add", "add_", "__add__", "__iadd__"):
            in_place = node.target in ("add_", "__iadd__")
        else:
            return None
        alpha = node.kwargs.get("alpha", 1)
        operands = [*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs)]
        others = node.kwargs.keys() - {"alpha", "input", "other"}
        if alpha != 1 or others or len(operands) != 2:
            return None
        first, second = operands
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
            return None
        return first, second, in_place


def why_not_skipped(module: nn.Module) -> str | None:
    """Return why a call of one of torch's modules is more than its forward."""
    why = why_opaque(module)
    return None if why is None or why.endswith("of torch") else why


def is_in_place(node: fx.Node, value: fx.Node | None, nodes: Nodes) -> bool:
    """Tell whether a node may change its first input in place, which is ``value`` unless it is None."""
    if value is not None and (not node.all_input_nodes or node.args[:1] != (value,)):
        return False
    module = nodes.module_of(node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (
        node.target in _IN_PLACE
        or (name.endswith("_") and not name.endswith("__"))
        or node.kwargs.get("inplace") is True
        or any(value is True for value in node.args[1:])  # some take inplace by position
        or "out" in node.kwargs
    )


def argument_of(node: fx.Node, name: str, position: int | None = None, default: Any = None) -> Any:
    """Return an argument that a node calls its function with."""
    if name in node.kwargs:
        return node.kwargs[name]
    if position is not None:
        return node.args[position] if len(node.args) > position else default
    assert callable(node.target)
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments.get(name, default)
