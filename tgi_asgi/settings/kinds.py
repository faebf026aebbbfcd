"""The kinds of values that settings have: how `--help` names them, and which of them are valid."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from tgi_asgi.settings.speculation import MAX_DRAFTS


class Kind(NamedTuple):
    """A value's metavar in `--help` (None: its type's), its rule if it is set, and its choices."""

    metavar: str | None = None
    rule: str = ""
    holds: Callable[[Any], object] = lambda value: True
    choices: tuple[str, ...] = ()


def one_of(words: str) -> Kind:
    choices = tuple(words.split())
    return Kind(None, f"be one of {', '.join(choices)}", choices.__contains__, choices)


def is_address(text: str) -> bool:
    """Return whether a HOSTNAME variable means to say where to listen: Docker and shells set it, too.

    As in TGI, only an address does, and `localhost`.
    """
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return text == "localhost"
    return True


PLAIN = Kind()
HOST = Kind(None, "not be empty", str.strip)
FILE = Kind("PATH", "not be empty", str.strip)
# For values that headers, spans and log lines repeat.
WORDS = Kind(None, "be printable, and not be empty", lambda value: value.isprintable() and value.strip())
URL = WORDS._replace(metavar="URL")
# What browsers send as Origin, or any; another value would never equal it.
ORIGIN = Kind(
    "ORIGIN",
    "be * or as https://example.org",
    lambda value: all(
        re.fullmatch(r"(?i)\*|null|[a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+/?", each) for each in value
    ),
)
# Hosts, at least one, separated by commas; there may be nothing between two.
_HOSTS = re.compile(r"[\s,]*[\w.:-]+(\s*,[\s,]*[\w.:-]+)*[\s,]*")
# TGI's methods are named by its users' settings, but the files say how they are quantised.
_METHODS = {
    "q8_0", "q4_0", "awq", "compressed-tensors", "eetq", "exl2", "gptq", "marlin", "bitsandbytes",
    "bitsandbytes-nf4", "bitsandbytes-fp4", "fp8",
}  # fmt: skip
METHOD = Kind(None, "be q8_0 or q4_0", lambda value: value.lower() in _METHODS)
KEY = Kind("KEY")  # one or several; never shown
PORT = Kind(None, "be in 0..65535", lambda value: 0 <= value <= 65535)
# Of a request's path, so without a query; braces would be parameters of the route.
ROUTE = Kind("PATH", "be a path", lambda value: re.fullmatch(r"(/[^\s/?#{}]+)+/?", value))
COUNT = Kind(None, "be at least 1", lambda value: value >= 1)
TOTAL = Kind(None, "be at least 2", lambda value: value >= 2)  # tokens: one of a prompt, one of an answer
BYTES = COUNT._replace(metavar="BYTES")
# A step has buffers of these sizes; beyond them, indices and allocations would fail one by one.
ROWS = Kind(None, "be in 1..65536", lambda value: 1 <= value <= 65536)
THREADS = Kind(None, "be in 1..1024", lambda value: 1 <= value <= 1024)  # of a team or a pool
STEP_TOKENS = Kind(None, "be in 1..1048576", lambda value: 1 <= value <= 1 << 20)
AMOUNT = Kind(None, "not be negative", lambda value: value >= 0)
BUDGET = Kind(None, "be at least -1", lambda value: value >= -1)
SECONDS, RATIO = AMOUNT._replace(metavar="SECONDS"), AMOUNT._replace(metavar="RATIO")
DELAY = Kind("SECONDS", "be in 0..86400", lambda value: 0 <= value <= 86400)  # a day
TIMEOUT = Kind("SECONDS", "be positive", lambda value: value > 0)
# uvloop counts milliseconds; a shorter timer is none, and cannot be asked when it ends.
STEP_TIMEOUT = Kind("SECONDS", "be at least 0.001", lambda value: value >= 0.001)
PERIOD = TIMEOUT._replace(metavar="MS")
FRACTION = Kind("SHARE", "be above 0 and at most 1", lambda value: 0 < value <= 1)
NICE = Kind("0..19", "be in 0..19", lambda value: 0 <= value <= 19)
PIXELS = Kind("PIXELS", "be in 1..89478485", lambda value: 1 <= value <= 89_478_485)  # Pillow's own limit
HOSTS = Kind("HOSTS", "be host names", lambda value: all(map(_HOSTS.fullmatch, value)))
RANK = Kind(None, "be in 1..512", lambda value: 1 <= value <= 512)
ADAPTERS = Kind("ADAPTERS", "name adapters", lambda value: all(each.strip(" ,") for each in value))
MODULES = Kind("NAME=PATH", "name adapters", lambda value: all(each.strip() for each in value))
BLOCK = Kind(None, "be 16, 32 or 64", (16, 32, 64).__contains__)
DRAFTS = Kind(None, "be in 0..64", lambda value: 0 <= value <= MAX_DRAFTS)
JSON = Kind("JSON")
FACTOR = Kind("FACTOR", "be in 1..1000", lambda value: 1 <= value <= 1000)
