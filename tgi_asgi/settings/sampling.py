"""Defaults of the sampling values: recommended by the model's authors, or set by the administrator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tgi_asgi.settings.json_object import bad_option, parse_object

# Each field's smallest and largest value. A top_p of 0 keeps one token; a top_k of 0 or -1 keeps all.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (-1, 2**31 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (1e-6, 1),
    "repetition_penalty": (1e-6, 1e6),
}


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Defaults under the names of `transformers`' generation_config.json; None: as the API defines.

    SamplingDefaults.parse('{"temperature": 0.6, "top_k": 20}')
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def parse(cls, text: str) -> SamplingDefaults:
        """Parse the value of `--override-generation-config`.

        Raises:
            InvalidRequest: if it is not an object of these fields, or a value is out of range.
        """
        option = "override_generation_config"
        given = parse_object(option, text)
        for name in given:
            if name not in _RANGES:
                raise bad_option(option, f"have {', '.join(_RANGES)} only", repr(name))
        for name, rule in broken_rules(given).items():
            raise bad_option(option, f"have {name} {rule}", repr(given[name]))
        return cls.of(given)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> SamplingDefaults:
        """Return the fields that `given` has with valid values; everything else in it is ignored."""
        broken = broken_rules(given)
        values: dict[str, Any] = {
            name: value if name == "top_k" else float(value)
            for name in _RANGES
            if (value := given.get(name)) is not None and name not in broken
        }
        return cls(**values)

    def replaced_by(self, other: SamplingDefaults) -> SamplingDefaults:
        """Return these defaults with the values of `other` in their place, where it has any."""
        return dataclasses.replace(self, **other.given())

    def given(self) -> dict[str, Any]:
        """Return the fields that have a value."""
        return {name: value for name in _RANGES if (value := getattr(self, name)) is not None}


NO_DEFAULTS = SamplingDefaults()


def broken_rules(given: Mapping[str, Any]) -> dict[str, str]:
    """Return what each value that is not valid must be, by its field. Null is valid."""
    found = {}
    for name, (low, high) in _RANGES.items():
        value, types = given.get(name), (int,) if name == "top_k" else (int, float)
        if value is not None and not (type(value) in types and low <= value <= high):
            found[name] = f"{'as an integer ' if name == 'top_k' else ''}in {low}..{high}"
    return found
