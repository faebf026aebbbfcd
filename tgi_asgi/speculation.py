"""How many draft tokens a step may check, and how they are proposed: the value of `--speculative-config`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tgi_asgi.errors import InvalidRequest

MAX_DRAFTS = 64
_MAX_SHOWN = 200  # characters of a value shown in an error message


@dataclass(frozen=True, slots=True)
class Speculation:
    """How draft tokens are proposed: from what followed the last earlier occurrence of the newest tokens.

        Speculation.parse('{"method": "ngram", "num_speculative_tokens": 8}')

    Attributes:
        num_tokens: Maximum number of draft tokens at once for one sequence.
        shortest, longest: How many of the newest tokens must match earlier text, at least and at most.
    """

    num_tokens: int
    shortest: int = 2
    longest: int = 32

    @classmethod
    def parse(cls, text: str) -> Speculation:
        """Parse the value of vLLM's `--speculative-config`.

        Raises:
            InvalidRequest: if it is not such an object, or asks for something unsupported.
        """
        try:
            given = json.loads(text)
        except RecursionError:
            raise _bad_speculation("be JSON that does not nest deeply", text) from None
        except ValueError as error:
            raise _bad_speculation(f"be JSON ({error})", text) from None
        if not isinstance(given, dict):
            raise _bad_speculation("be an object", text)
        method = given.pop("method", None) or str(given.get("model", "")).strip("[]")
        if method != "ngram":
            raise _bad_speculation('have the method "ngram": draft models are not supported', repr(method))
        if given.pop("model", "ngram") not in ("ngram", "[ngram]"):
            raise _bad_speculation("have no draft model", text)
        sizes = {"num_speculative_tokens": "num_tokens"}
        sizes |= {"prompt_lookup_min": "shortest", "prompt_lookup_max": "longest"}
        values: dict[str, int] = {}
        for name, value in given.items():
            if name not in sizes:
                raise _bad_speculation(f"have {', '.join(sizes)} only", repr(name))
            if type(value) is not int or not 1 <= value <= MAX_DRAFTS:
                raise _bad_speculation(f"have {name} in 1..{MAX_DRAFTS}", repr(value))
            values[sizes[name]] = value
        if "num_tokens" not in values:
            raise _bad_speculation("have num_speculative_tokens", text)
        if "shortest" not in values:  # if only one is given, it moves the other, as in vLLM
            values["shortest"] = min(cls(1).shortest, values.get("longest", MAX_DRAFTS))
        values.setdefault("longest", max(cls(1).longest, values["shortest"]))
        found = cls(**values)
        if found.shortest > found.longest:
            raise _bad_speculation("have prompt_lookup_min up to prompt_lookup_max", text)
        return found


def _bad_speculation(rule: str, value: str) -> InvalidRequest:
    shown = value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}..."
    return InvalidRequest(f"--speculative-config must {rule}, got {shown}", param="speculative_config")
