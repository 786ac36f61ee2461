"""The settings of a run: what decides its result, and how two of them differ."""

from typing import Any


def differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Return a phrase for each value that differs, such as ``"inversion.learning_rate was 0.1 and is 0.2"``.

    Args:
        found: Settings recorded by an earlier run: nested dictionaries of plain values.
        wanted: Settings of this run.
        name: Name of the values, in front of the keys.

    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = dict.fromkeys([*found, *wanted])
        return [
            phrase
            for key in keys
            for phrase in differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else str(key))
        ]
    if isinstance(found, (list, tuple)) and isinstance(wanted, (list, tuple)):
        found, wanted = list(found), list(wanted)
    return [] if found == wanted else [f"{name} was {_short(found)} and is {_short(wanted)}"]


def _short(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
