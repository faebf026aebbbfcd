"""The engine's contents as plain values for a person to read; contains no text of any client."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tgi_asgi.engine.admission import Admission
from tgi_asgi.engine.channel import RequestChannel
from tgi_asgi.engine.sequence import Sequence, Stage
from tgi_asgi.engine.states import KeptStates
from tgi_asgi.engine.stats import EngineStats
from tgi_asgi.engine.tables import BlockTables

_COUNTERS = ("accepted", "finished", "failed", "cancelled", "steps", "failed_steps", "preemptions")


def describe(
    admission: Admission,
    tables: BlockTables,
    channels: Iterable[RequestChannel],
    stats: EngineStats,
    now_s: float,
) -> dict[str, Any]:
    """Return counters, permits, blocks and every open request with its sequences, oldest first."""
    pool = tables.pool
    ordered = sorted(channels, key=lambda channel: channel.stats.arrival_s)
    return {
        "counters": {name: getattr(stats, name) for name in _COUNTERS},
        "permits": {"capacity": admission.capacity, "taken": admission.num_taken},
        "blocks": {
            "total": pool.num_blocks,
            "used": pool.num_used,
            "free": pool.num_free,
            "touched": pool.num_touched,
        },
        **({} if tables.states is None else {"kept_states": _states(tables.states)}),
        "requests": [_request(channel, now_s) for channel in ordered],
    }


def _states(states: KeptStates) -> dict[str, int]:
    return {"total": states.pool.num_blocks, "used": states.pool.num_used, "findable": states.num_known}


def _request(channel: RequestChannel, now_s: float) -> dict[str, Any]:
    request, stats = channel.request, channel.stats
    return {
        "request_id": request.request_id,
        "tenant": channel.permit.tenant,
        "age_s": round(now_s - stats.arrival_s, 3),
        "priority": request.priority,
        "prompt_tokens": len(request.prompt_ids),
        "max_tokens": request.stop.max_tokens,
        "cached_tokens": stats.cached_tokens,
        "generated_tokens": stats.generated_tokens,
        "sequences": [_sequence(sequence) for sequence in channel.sequences],
    }


def _sequence(sequence: Sequence) -> dict[str, Any]:
    return {
        "choice": sequence.choice,
        "state": sequence.stage.value,
        "slot": sequence.slot if sequence.stage is Stage.RUNNING else None,
        "computed_tokens": sequence.num_computed,
        "output_tokens": sequence.num_output,
        "blocks": [table[first:] for table, first in zip(sequence.tables, sequence.num_freed, strict=True)],
    }
