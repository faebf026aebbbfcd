"""Which tests a run takes: nightly ones only when `-m` names them, and what needs the network by one marker.

`pytest` takes none that needs minutes, `pytest -m soak` such tests alone, and `pytest -m "not demo"` all that
also run without network. A test gets the marker `demo` by a fixture that fetches, and a connection from any
other test to another machine fails, so that no test can be without it.
"""

from __future__ import annotations

import ipaddress
import re
import sys
from collections.abc import Generator

import pytest

# What these return is fetched once, and then lies in the user's cache or in build/.
FETCHING = frozenset({"demo_files", "llama_cpp", "llama_cpp_package", "json_schema_suite", "vllm_examples"})


class Selection:
    """Deselects, marks, and holds what is not marked to this machine."""

    def __init__(self, nightly: list[str]) -> None:
        self._nightly = frozenset(nightly)
        self._is_offline = False
        sys.addaudithook(self._audit)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Apply the markers, then leave out what was not named."""
        left_out = self._nightly - set(re.findall(r"\w+", config.option.markexpr or ""))
        kept: list[pytest.Item] = []
        dropped: list[pytest.Item] = []
        for item in items:
            if FETCHING & set(getattr(item, "fixturenames", ())):
                item.add_marker("demo")
            names = {marker.name for marker in item.iter_markers()}
            (dropped if names & left_out else kept).append(item)
        if dropped:
            config.hook.pytest_deselected(items=dropped)
        # What compiles for minutes begins first, so that no process waits for it at the end.
        items[:] = sorted(kept, key=lambda item: item.get_closest_marker("time_limit") is None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        names = {marker.name for marker in item.iter_markers()}
        self._is_offline = not names & {"demo", *self._nightly}
        try:
            return (yield)
        finally:
            self._is_offline = False

    def _audit(self, event: str, arguments: tuple[object, ...]) -> None:
        if event != "socket.connect" or not self._is_offline:
            return
        address = arguments[1]
        if isinstance(address, tuple) and not _is_local(str(address[0])):
            raise AssertionError(f"a test without the marker `demo` connects to {address[0]}")


def _is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified
