"""Builds a user's network by name."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

FAILURES = (TypeError, ValueError, RuntimeError, LookupError, AssertionError)  # of a constructor, on wrong arguments


def load_model(name: str, arguments: str = "{}", *, pretrained: bool = False) -> nn.Module:
    """Build a network.

    Args:
        name: ``package.module:callable``, optionally from the current folder, or the name of a torchvision or timm
            model.
        arguments: Keyword arguments of the callable, as a JSON object.
        pretrained: Whether a torchvision or timm model is built with its published weights, which are downloaded
            unless they are at hand.

    Raises:
        ValueError: If the callable or model does not exist, does not take the arguments, or does not return a network.

    """
    try:
        keywords = json.loads(arguments)
    except json.JSONDecodeError:
        keywords = None
    if not isinstance(keywords, dict):
        raise ValueError(f"model arguments must be a JSON object such as '{{\"width\": 16}}', got {arguments!r}")
    if ":" not in name:
        return _network(name, _library_model(name, pretrained), keywords)
    if pretrained:
        raise ValueError(f"--pretrained is for torchvision and timm models; {name} gets its weights by --checkpoint")
    return _network(name, _imported(name), keywords)


def _network(name: str, build: Callable[..., Any], keywords: dict[str, Any]) -> nn.Module:
    try:
        model = build(**keywords)
    except FAILURES as error:
        raise ValueError(
            f"{name} cannot be built with the model arguments {json.dumps(keywords)} ({type(error).__name__}: {error})"
        ) from error
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ValueError(f"{name} returned the class {model.__name__}; expected a network, so call it")
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returned {type(model).__name__}; expected a torch.nn.Module")
    return model


def _imported(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    if not module_name or module_name.startswith(".") or not attribute:
        raise ValueError(f"model {name!r} is not package.module:callable")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ValueError(f"{name}: module {error.name!r} is neither installed nor in the current folder") from error
    found = getattr(module, attribute, None)
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise ValueError(f"{name}: {module_name} has no callable {attribute!r}")
    return found  # type: ignore[no-any-return]


def _library_model(name: str, pretrained: bool) -> Callable[..., Any]:
    installed = [library for library in ("torchvision", "timm") if importlib.util.find_spec(library) is not None]
    build: Callable[..., Any] | None = None
    if "torchvision" in installed:
        from torchvision import models

        if name in models.list_models():
            weights = "DEFAULT" if pretrained else None
            build = lambda **keywords: models.get_model(name, weights=weights, **keywords)  # noqa: E731
    if build is None and "timm" in installed:
        import timm

        if timm.is_model(name):
            build = lambda **keywords: timm.create_model(name, pretrained=pretrained, **keywords)  # noqa: E731
    if build is None:
        known = (
            f"is not in {' or '.join(installed)}" if installed else "needs torchvision or timm; neither is installed"
        )
        raise ValueError(f"model {name!r} {known}. Name a model of your own as package.module:callable")
    return _downloading(name, build) if pretrained else build


def _downloading(name: str, build: Callable[..., Any]) -> Callable[..., Any]:
    def built(**keywords: Any) -> Any:
        try:
            return build(**keywords)
        except OSError as error:  # urllib's, huggingface_hub's and requests' errors are of this type
            raise ValueError(
                f"the published weights of {name} could not be downloaded ({error}); download them elsewhere and give "
                "the file by --checkpoint"
            ) from error

    return built
