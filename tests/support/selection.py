"""Select the tests of a run: many only if `-m` names their marker, tests that need the network by a marker.

`pytest` runs no test that takes minutes, `pytest -m soak` only such tests, and `pytest -m "not demo"` all
tests that also run without network. Tests with the markers `thorough` and `faults` also run if the command
names their file. A test gets the marker `demo` if it uses a fixture that fetches. A connection to another
machine from any other test fails, so no test can lack the marker.
"""

from __future__ import annotations

import ipaddress
import re
import sys
from collections.abc import Generator

import pytest

# Left out unless `-m` names them or the command names the file; otherwise tests like all others.
SELDOM = frozenset({"thorough", "faults"})
# The results of these fixtures are fetched once and then kept in the user's cache or in build/.
FETCHING = frozenset({"demo_files", "llama_cpp", "llama_cpp_package", "json_schema_suite", "vllm_examples"})


class Selection:
    """Deselect and mark tests, and restrict tests without the marker `demo` to local connections."""

    def __init__(self, nightly: list[str]) -> None:
        self._nightly = frozenset(nightly)
        self._is_offline = False
        sys.addaudithook(self._audit)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Apply the markers, then deselect tests whose marker was not named."""
        left_out = (self._nightly | SELDOM) - set(re.findall(r"\w+", config.option.markexpr or ""))
        folder = config.invocation_params.dir
        named = {(folder / argument.partition("::")[0]).resolve() for argument in config.args}
        kept: list[pytest.Item] = []
        dropped: list[pytest.Item] = []
        for item in items:
            if FETCHING & set(getattr(item, "fixturenames", ())):
                item.add_marker("demo")
            names = {marker.name for marker in item.iter_markers()}
            if item.path in named:
                names -= SELDOM
            (dropped if names & left_out else kept).append(item)
        if dropped:
            config.hook.pytest_deselected(items=dropped)
        # Start tests that compile for minutes first, so that no process waits for them at the end.
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
