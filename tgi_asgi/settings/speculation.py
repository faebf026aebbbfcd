"""How many draft tokens a step may check, and how they are proposed: the value of `--speculative-config`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tgi_asgi.settings.json_object import bad_option, parse_object

MAX_DRAFTS = 64
_bad = partial(bad_option, "speculative_config")


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
        given = parse_object("speculative_config", text)
        method = given.pop("method", None) or str(given.get("model", "")).strip("[]")
        if method != "ngram":
            raise _bad('have the method "ngram": draft models are not supported', repr(method))
        if given.pop("model", "ngram") not in ("ngram", "[ngram]"):
            raise _bad("have no draft model", text)
        sizes = {"num_speculative_tokens": "num_tokens"}
        sizes |= {"prompt_lookup_min": "shortest", "prompt_lookup_max": "longest"}
        values: dict[str, int] = {}
        for name, value in given.items():
            if name not in sizes:
                raise _bad(f"have {', '.join(sizes)} only", repr(name))
            if type(value) is not int or not 1 <= value <= MAX_DRAFTS:
                raise _bad(f"have {name} in 1..{MAX_DRAFTS}", repr(value))
            values[sizes[name]] = value
        if "num_tokens" not in values:
            raise _bad("have num_speculative_tokens", text)
        if "shortest" not in values:  # if only one is given, it moves the other, as in vLLM
            values["shortest"] = min(cls(1).shortest, values.get("longest", MAX_DRAFTS))
        values.setdefault("longest", max(cls(1).longest, values["shortest"]))
        found = cls(**values)
        if found.shortest > found.longest:
            raise _bad("have prompt_lookup_min up to prompt_lookup_max", text)
        return found
