"""The checkpoint of a student's training, and what it is compared with."""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from kdkernels._settings import differences
from kdkernels.checkpoints import load_checkpoint, random_states, save_checkpoint, set_random_states


def plain(value: Any) -> Any:
    """Return a setting as plain values, which a checkpoint keeps without code."""
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return float(value)


class Saver:
    """The checkpoint of a training, with everything that decides how it goes on."""

    def __init__(self, path: Path, parts: dict[str, Any], settings: dict[str, Any], loader: Iterable[Any]) -> None:
        self.path, self.parts, self.settings = path, parts, settings
        sampler = getattr(loader, "sampler", None)
        owners = {"loader": loader, "sampler": sampler, "batch_sampler": getattr(loader, "batch_sampler", None)}
        found = {name: getattr(owner, "generator", None) for name, owner in owners.items()}
        self.generators = {name: value for name, value in found.items() if isinstance(value, torch.Generator)}

    def resume(self, epochs: int) -> dict[str, list[float]] | None:
        """Restore the checkpoint and return its history; if there is none, try that one can be written and read."""
        before = random_states()
        state = load_checkpoint(self.path)
        if state is None:
            self._rehearse()
            return None
        settings = state.get("settings", {})
        for name in ("batch_size", "batches"):  # not every loader tells
            if None in (settings.get(name), self.settings[name]):
                settings[name] = self.settings[name]
        differing = differences(settings, self.settings)
        done = len(state["history"]["loss"])
        if differing or done > epochs:
            set_random_states(before)
            if differing:
                raise ValueError(
                    f"{self.path} holds another run: {'; '.join(differing)}. Use the same values, or another checkpoint"
                )
            raise ValueError(
                f"epochs is {epochs}, but {self.path} already holds {done} epochs; expected {done} or more"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        return state["history"]  # type: ignore[no-any-return]

    def save(self, history: dict[str, list[float]]) -> None:
        """Write the checkpoint."""
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        generators = {name: generator.get_state() for name, generator in self.generators.items()}
        save_checkpoint(self.path, state | {"history": history, "settings": self.settings, "generators": generators})

    def _rehearse(self) -> None:
        """Raise unless every part can be written and read back."""
        trial = self.path.with_name(self.path.name + ".trial")
        try:
            for name, part in self.parts.items():
                try:
                    save_checkpoint(trial, {name: part.state_dict()})
                    load_checkpoint(trial)
                except (pickle.PickleError, AttributeError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"the state of {name} ({type(part).__name__}) cannot be saved and read back as tensors and "
                        f"plain values: {str(error).splitlines()[0]}"
                    ) from error
        finally:
            trial.unlink(missing_ok=True)
