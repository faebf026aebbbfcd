"""The buffers of a program's values: each is reused once no later call reads its contents."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from tgi_asgi import _C
from tgi_asgi.ops import calls
from tgi_asgi.ops.kv import KvPool
from tgi_asgi.ops.values import Kind, Value


class Liveness:
    """Which calls use which value, in which precisions, and for how long.

    Args:
        recorded: The calls, in order.
        inputs: Values that are written before the first call.
        outputs: Values that are needed after the last call.
        precisions_of: Function that returns the precisions in which a call needs its activation.
    """

    def __init__(
        self,
        recorded: Sequence[calls.Call],
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        precisions_of: Callable[[calls.Call], list[str]],
    ) -> None:
        self._spans: dict[Value, tuple[int, int]] = {}  # by root: its first call and its last
        self._precisions: dict[Value, list[str]] = {}
        self._scales: dict[Value, float] = {}
        for value in inputs:
            self._touch(value, -1)
        for index, call in enumerate(recorded):
            for value in call.inputs:
                self._touch(value, index)
                if value.kind is Kind.ACTIVATION:
                    self._want(value, precisions_of(call))
            self._touch(call.out, index)
            if (
                isinstance(call, calls.Attention)
                and self._scales.setdefault(call.q, call.spec.scale) != call.spec.scale
            ):
                raise ValueError("a query can be used with only one scale")
        for value in (*inputs, *outputs):
            self._touch(value, len(recorded))
        for value in outputs:
            if value.kind is Kind.ACTIVATION:
                self._want(value, ["float32"])

    def _touch(self, value: Value, index: int) -> None:
        first, _ = self._spans.get(value.root, (index, index))
        self._spans[value.root] = (first, index)

    def _want(self, value: Value, precisions: Iterable[str]) -> None:
        wanted = self._precisions.setdefault(value, [])
        wanted += [precision for precision in dict.fromkeys(precisions) if precision not in wanted]

    def precisions(self, value: Value) -> list[str]:
        """Return the precisions in which an activation is read; empty if no call reads it."""
        return self._precisions.get(value, [])

    def query_scale(self, value: Value) -> float | None:
        """Return the factor on a query's scores; None if no call attends with it."""
        return self._scales.get(value)

    def ending_at(self, index: int) -> list[Value]:
        """Return the values that no call after this one reads."""
        return [value for value, (_, last) in self._spans.items() if last == index]

    def alive_after(self, index: int) -> list[Value]:
        """Return the values computed up to this call that a later one reads."""
        return [value for value, (first, last) in self._spans.items() if first <= index < last]


class Buffers:
    """The buffers of a program's values. Residuals that replace each other share one buffer."""

    def __init__(self) -> None:
        self._assigned: dict[tuple[Value, str], tuple[Hashable, Any]] = {}
        self._free: dict[Hashable, list[Any]] = {}
        self._acquired: dict[int, Hashable] = {}  # kind of each taken buffer, by its id

    def assign(self, value: Value, form: str, kind: Hashable, make: Callable[[], Any]) -> Any:
        """Assign a value a buffer for one of its forms (rows, query, routing, a precision), until `free`."""
        buffer = self.acquire(kind, make)
        self._assigned[value.root, form] = (self._acquired.pop(id(buffer)), buffer)
        return buffer

    def of(self, value: Value, form: str) -> Any:
        """Return the buffer of a value's form.

        Raises:
            LookupError: if it has none: no call computes the value in this form, or its buffer was freed.
        """
        found = self.find(value, form)
        if found is None:
            raise LookupError(f"{value.kind.value} has no buffer as {form}")
        return found

    def find(self, value: Value, form: str) -> Any:
        """Return the buffer of a value's form; None if it has none."""
        found = self._assigned.get((value.root, form))
        return None if found is None else found[1]

    def acquire(self, kind: Hashable, make: Callable[[], Any]) -> Any:
        """Take a buffer of this kind, a free one if possible, until `release`."""
        free = self._free.get(kind)
        buffer = free.pop() if free else make()
        self._acquired[id(buffer)] = kind
        return buffer

    def release(self, buffer: Any) -> None:
        """Return a buffer taken with `acquire`."""
        self._free.setdefault(self._acquired.pop(id(buffer)), []).append(buffer)

    def free(self, values: Iterable[Value]) -> None:
        """Release the buffers of values for reuse."""
        ended = set(values)
        for key in [key for key in self._assigned if key[0] in ended]:
            kind, buffer = self._assigned.pop(key)
            self._free.setdefault(kind, []).append(buffer)


class CpuBuffers(Buffers):
    """The buffers of a program of the extension."""

    def __init__(self, native: _C.Program) -> None:
        super().__init__()
        self._native = native

    def rows(self, value: Value, columns: int) -> Any:
        """Assign a value a float32 buffer."""
        return self.assign(value, "rows", ("rows", columns), lambda: self._native.rows(columns))

    def activation(self, value: Value, precision: str) -> Any:
        """Assign a value an activation buffer of this precision."""
        kind = ("activation", value.columns, precision)
        return self.assign(value, precision, kind, lambda: self._native.activation(value.columns, precision))

    def query(self, value: Value, pool: KvPool, num_heads: int) -> Any:
        """Assign a value a buffer for queries, in this pool's layout."""
        kind = ("query", id(pool), num_heads)
        return self.assign(value, "query", kind, lambda: self._native.query(pool.native, num_heads))

    def routing(self, value: Value, num_experts: int, top_k: int) -> Any:
        """Assign a value a buffer for each token's experts."""
        kind = ("routing", num_experts, top_k)
        return self.assign(value, "routing", kind, lambda: self._native.routing(num_experts, top_k))

    def expert_rows(self, columns: int, precision: str, num_experts: int) -> Any:
        """Take a buffer for rows sorted by expert, until `release`; each expert may start a new tile."""
        kind = ("expert rows", columns, precision, num_experts)
        return self.acquire(kind, lambda: self._native.activation(columns, precision, min_tiles=num_experts))

    def scratch(self, columns: int) -> Any:
        """Take rows for a call's internal use, until `release`."""
        return self.acquire(("rows", columns), lambda: self._native.rows(columns))

    def head_rows(self, columns: int) -> Any:
        """Take rows for attention's result. Attention does not write the padding, which must stay zero.

        These buffers are kept apart from products' rows: a product writes the padding, and a NaN there would
        persist into the following steps.
        """
        return self.acquire(("head rows", columns), lambda: self._native.rows(columns))
