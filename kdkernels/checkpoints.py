"""Weights in files as other people write them, and files from which an interrupted run resumes."""

import hashlib
import os
import pickle
import random
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kdkernels._files import atomic_file, read_tensor_file, require_safetensors

__all__ = ["fingerprint", "load_checkpoint", "load_weights", "save_checkpoint", "save_weights"]

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
COUNTER = "num_batches_tracked"
NETWORKS = {"model", "net", "network", "student", "teacher", "state_dict", "model_state", "model_state_dict", "ema"}


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a network's weights from a safetensors or a torch file, wherever in it they are.

    The file may be a state dict or a checkpoint that has one in it under any name (``"state_dict"``, ``"model"``,
    ``"net"``, ...). Prefixes (``"module."``, ``"_orig_mod."``, ``"model."``, ...) are removed where the names fit the
    network only without them. Of two tied weights one suffices, and ``num_batches_tracked`` may be missing, as in files
    of old versions of PyTorch. Nothing in the file is executed: it is read as with ``weights_only=True``.

    Args:
        model: Network whose parameters and buffers are overwritten; they keep their device and dtype.
        path: File; its format is told by its content.

    Raises:
        ValueError: If the file cannot be read, nothing in it fits the network, or several different state dicts do.
        ImportError: If it is a safetensors file, and safetensors is not installed.

    Example:
        >>> import tempfile
        >>> network, path = torch.nn.Linear(2, 3), tempfile.mkdtemp() + "/trained.pt"
        >>> torch.save({"epoch": 7, "net": torch.nn.DataParallel(network).state_dict()}, path)
        >>> load_weights(torch.nn.Linear(2, 3), path)

    """
    expected = _state_of(model)
    candidates = [
        (where, state)
        for where, mapping in _candidates(read_tensor_file(path), "")
        for state in _named_as(expected, mapping)
    ]
    fitting = [(where, state) for where, state in candidates if not any(_differences(state, expected).values())]
    if not fitting:
        raise ValueError(_why_nothing_fits(path, candidates, expected, type(model).__name__))
    (where, state), *others = fitting
    for other, same in others:
        if not all(_equal(value, same[name]) for name, value in state.items()):
            raise ValueError(
                f"checkpoint '{path}' holds several networks that fit {type(model).__name__}, such as "
                f"{where or 'the whole'} and {other}; save the one you mean in a file of its own"
            )
    for name, twin in _twins(expected).items():
        if name in state and twin in state and not _equal(state[name], state[twin]):
            raise ValueError(
                f"checkpoint '{path}' holds different values for {twin} and {name}, which are one tied tensor in "
                f"{type(model).__name__}; untie them in the network, or load weights of a tied one"
            )
    fitted = OrderedDict(state)
    # The names are those of this version of the network's modules, also where the file names no version or another one.
    fitted._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(fitted, strict=False)


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network's parameters and buffers to a safetensors file, atomically.

    Tied weights are written once for each of their names, so ``model.load_state_dict(load_file(path))`` is enough to
    load them.

    Args:
        model: Network on any device.
        path: File to write.

    Raises:
        ValueError: If the state of the network is not made of dense tensors alone.
        OSError: If the file cannot be written.
        ImportError: If safetensors is not installed.

    Example:
        >>> import tempfile
        >>> network, path = torch.nn.Linear(2, 3), tempfile.mkdtemp() + "/trained.safetensors"
        >>> save_weights(network, path)
        >>> load_weights(torch.nn.Linear(2, 3), path)

    """
    data = weights_as_bytes(model)
    with atomic_file(path) as file:
        file.write(data)


def weights_as_bytes(model: nn.Module) -> bytes:
    """Return the content of the file that :func:`save_weights` writes, and raise its errors."""
    require_safetensors()
    from safetensors.torch import save

    state = _state_of(model)
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{type(model).__name__} keeps a state that is not a tensor in {', '.join(others)}, which a safetensors "
            "file cannot hold; save it with torch.save"
        )
    others = [name for name, value in state.items() if value.layout != torch.strided or value.is_quantized]
    if others:
        raise ValueError(
            f"{type(model).__name__} keeps sparse or quantized tensors in {', '.join(others)}, which a safetensors "
            "file cannot hold; save it with torch.save"
        )
    # Copies, because a file of safetensors has no shared memory.
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()})


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a checkpoint atomically, with the states of the random number generators.

    A process that is stopped leaves the previous checkpoint or the new one.

    Args:
        path: File to write.
        state: Tensors, plain values, and containers of them.

    Raises:
        OSError: If the file cannot be written.

    """
    with atomic_file(path) as file:
        torch.save({**state, "random_states": random_states()}, file)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read a checkpoint onto the CPU and restore the generators of torch, Python and NumPy.

    Args:
        path: File written by :func:`save_checkpoint`.

    Returns:
        The state, or None if there is no file.

    Raises:
        ValueError: If the file is damaged, or is not such a checkpoint.

    """
    if not Path(path).exists():
        return None
    remedy = "remove it to start again from the beginning"
    try:
        state = read_tensor_file(path)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
    if not isinstance(state, dict) or "random_states" not in state:
        raise ValueError(f"'{path}' is not a checkpoint of an interrupted run; name another file, or {remedy}")
    set_random_states(state.pop("random_states"))
    return state


def random_states() -> dict[str, Any]:
    """Return the states of the generators of torch, Python and NumPy, as tensors and plain values."""
    name, keys, *position = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *position],
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set the generators to states that :func:`random_states` returned."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a network's layers, parameters and buffers."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__};".encode())
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):
            digest.update(name.encode() + pickle.dumps(value))
            continue
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _state_of(model: nn.Module) -> dict[str, Any]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} of the network has no shape yet; run the network once on a batch of its inputs")
        if tensor.is_meta:
            raise ValueError(f"{name} of the network is on the meta device; move the network with to_empty first")
    return dict(model.state_dict())


def _twins(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the first name of every tensor that a state dict holds under several names, by the other names."""
    first: dict[Any, str] = {}
    twins = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.numel() > 0:
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if place in first:
                twins[name] = first[place]
            first.setdefault(place, name)
    return twins


def _candidates(found: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every mapping of names in a file with its place: nested ones, and those whose names share a prefix."""
    if isinstance(found, (list, tuple)):
        for index, value in enumerate(found):
            yield from _candidates(value, f"{where}[{index}]")
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        return
    yield where, dict(found)
    groups: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        yield from _candidates(value, f"{where}[{name!r}]")
        head, dot, rest = name.partition(".")
        if dot:
            groups.setdefault(head, {})[rest] = value
    for head, group in groups.items():
        # A network among others goes by a usual name; what all names begin with is a prefix.
        if head in NETWORKS | WRAPPERS or len(group) == len(found):
            yield from _candidates(group, f"{where}[{head + '.'!r}...]")


def _named_as(expected: Mapping[str, Any], mapping: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a mapping under its own names, then under those of the network that differ by wrappers' names alone."""
    yield mapping
    names = {_without_wrappers(name): name for name in expected}
    renamed = {names.get(_without_wrappers(name), name): value for name, value in mapping.items()}
    if renamed.keys() != mapping.keys() and len(names) == len(expected) and len(renamed) == len(mapping):
        yield renamed  # no two names became one


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _differences(state: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, list[str]]:
    twins = _twins(expected)
    held = {twins.get(name, name) for name in state}
    common = [
        (name, state[name], value)
        for name, value in expected.items()
        if isinstance(value, Tensor) and isinstance(state.get(name), Tensor)
    ]
    return {
        "missing": [name for name in expected if twins.get(name, name) not in held and not name.endswith(COUNTER)],
        "unexpected": [
            name
            for name, value in state.items()
            if name not in expected or isinstance(value, Tensor) != isinstance(expected[name], Tensor)
        ],
        "different shape": [
            f"{name} {list(found.shape)} instead of {list(value.shape)}"
            for name, found, value in common
            if found.shape != value.shape
        ],
        "different kind of number": [
            f"{name} {found.dtype} instead of {value.dtype}"
            for name, found, value in common
            if _kind(found) != _kind(value) and not name.endswith(COUNTER)
        ],
    }


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    """Tell floating-point, complex and quantized numbers, which are no weights of one another, apart."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.is_quantized


def _equal(one: Any, other: Any) -> bool:
    """Compare two entries of state dicts; NaN is equal to NaN."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one is other or torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _why_nothing_fits(
    path: str | os.PathLike[str],
    candidates: Sequence[tuple[str, dict[str, Any]]],
    expected: Mapping[str, Any],
    network: str,
) -> str:
    """Explain by the state dict that has most names in common with the network."""
    candidates = [(where, state) for where, state in candidates if any(isinstance(v, Tensor) for v in state.values())]
    if not candidates:
        return f"checkpoint '{path}' holds no state dict; write it with torch.save(model.state_dict(), path)"
    where, state = max(candidates, key=lambda candidate: len(candidate[1].keys() & expected.keys()))
    details = "; ".join(
        f"{text}: {', '.join(names[:5])}{' ...' * (len(names) > 5)}"
        for text, names in _differences(state, expected).items()
        if names
    )
    place = f" in {where}" if where else ""
    return f"checkpoint '{path}' does not match {network}{place}: {details}; build the network as it was trained"
