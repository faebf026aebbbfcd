"""What shard 0 and the operator are told when another shard fails."""

from __future__ import annotations

import pytest

from tests.support.failing_shard import FailingShard
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.runner.shard_processes import ShardProcesses


def reason_of(error: Exception) -> str:
    """Return what shard 0 is told of a shard that raises the error while it loads."""
    processes = ShardProcesses([FailingShard(error)], lambda reason: None)
    try:
        with pytest.raises(ModelLoadError) as raised:
            processes.wait_ready()
    finally:
        processes.kill()
    return str(raised.value)


def test_a_refused_model_is_told_without_a_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert reason_of(ModelLoadError("a tensor is missing")) == "shard 1: a tensor is missing"
    assert "Traceback" not in capfd.readouterr().err


def test_any_other_error_is_named_and_its_traceback_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert reason_of(KeyError("x")) == "shard 1: KeyError: 'x'"
    shown = capfd.readouterr().err
    assert "Traceback" in shown and "raise self.error" in shown
