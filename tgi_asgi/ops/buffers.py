"""The buffers of a program's values: each is reused once no later call reads its contents."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from tgi_asgi import _C
from tgi_asgi.ops import calls
from tgi_asgi.ops.column_order import Form, OrderedForm
from tgi_asgi.ops.kv import KvLayer
from tgi_asgi.ops.recorder import Call, Kind, Value

_Buffer = TypeVar("_Buffer")


class Liveness:
    """Which calls use which value, in which forms, and for how long.

    Args:
        recorded: The calls, in order.
        forms_of: Function that returns the forms in which a call needs its activation.
    """

    def __init__(self, recorded: Sequence[Call], forms_of: Callable[[Call], list[Form]]) -> None:
        self._spans: dict[Value, tuple[int, int]] = {}  # by root: its first call and its last
        self._forms: dict[Value, list[Form]] = {}
        self._scales: dict[Value, float] = {}
        for index, call in enumerate(recorded):
            for value in call.inputs:
                self._touch(value, index)
                if value.kind is Kind.ACTIVATION:
                    self._want(value, forms_of(call))
            self._touch(call.out, index)
            if (
                isinstance(call, calls.Attention)
                and self._scales.setdefault(call.q, call.spec.scale) != call.spec.scale
            ):
                raise ValueError("a query can be used with only one scale")

    def _touch(self, value: Value, index: int) -> None:
        first, _ = self._spans.get(value.root, (index, index))
        self._spans[value.root] = (first, index)

    def _want(self, value: Value, forms: Iterable[Form]) -> None:
        wanted = self._forms.setdefault(value, [])
        wanted += [form for form in dict.fromkeys(forms) if form not in wanted]

    def precisions(self, value: Value) -> list[str]:
        """Return the precisions in which an activation's call must write it; empty if no call reads it.

        Forms with an order of columns are made from float32.
        """
        forms = self._forms.get(value, [])
        return list(dict.fromkeys(form if isinstance(form, str) else "float32" for form in forms))

    def ordered_forms(self, value: Value) -> list[OrderedForm]:
        """Return the forms of an activation that have an order of columns."""
        return [form for form in self._forms.get(value, []) if isinstance(form, OrderedForm)]

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
        self._assigned: dict[tuple[Value, Form], tuple[Hashable, Any]] = {}
        self._free: dict[Hashable, list[Any]] = {}
        self._acquired: dict[int, Hashable] = {}  # kind of each taken buffer, by its id

    def assign(self, value: Value, form: Form, kind: Hashable, make: Callable[[], _Buffer]) -> _Buffer:
        """Assign a value a buffer for one of its forms, until `free`: rows, query, routing, or a `Form`."""
        buffer = self.acquire(kind, make)
        self._assigned[value.root, form] = (self._acquired.pop(id(buffer)), buffer)
        return buffer

    def of(self, value: Value, form: Form) -> Any:
        """Return the buffer of a value's form.

        Raises:
            LookupError: if it has none: no call computes the value in this form, or its buffer was freed.
        """
        found = self.find(value, form)
        if found is None:
            raise LookupError(f"{value.kind.value} has no buffer as {form}")
        return found

    def find(self, value: Value, form: Form) -> Any:
        """Return the buffer of a value's form; None if it has none."""
        found = self._assigned.get((value.root, form))
        return None if found is None else found[1]

    def acquire(self, kind: Hashable, make: Callable[[], _Buffer]) -> _Buffer:
        """Take a buffer of this kind, a free one if possible, until `release`."""
        free: list[_Buffer] | None = self._free.get(kind)
        buffer = free.pop() if free else make()
        self._acquired[id(buffer)] = kind
        return buffer

    def release(self, buffer: object) -> None:
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

    def assign_rows(self, value: Value, columns: int) -> _C.Rows:
        """Assign a value a float32 buffer."""
        return self.assign(value, "rows", ("rows", columns), lambda: self._native.rows(columns))

    def assign_activation(self, value: Value, form: Form) -> _C.Activation:
        """Assign a value an activation buffer of this form."""
        precision = form if isinstance(form, str) else form.precision
        kind = ("activation", value.columns, precision)
        return self.assign(value, form, kind, lambda: self._native.activation(value.columns, precision))

    def assign_query(self, value: Value, layer: KvLayer, num_heads: int) -> _C.Query:
        """Assign a value a buffer for queries against this layer's keys."""
        kind = ("query", layer.head_dim, num_heads)  # all layers are of one pool
        native, index = layer.pool.native, layer.index
        return self.assign(value, "query", kind, lambda: self._native.query(native, index, num_heads))

    def assign_routing(self, value: Value, num_experts: int, top_k: int) -> _C.Routing:
        """Assign a value a buffer for each token's experts."""
        kind = ("routing", num_experts, top_k)
        return self.assign(value, "routing", kind, lambda: self._native.routing(num_experts, top_k))

    def rows_of(self, value: Value) -> _C.Rows:
        """Return a value's rows; raises as `of`."""
        found: _C.Rows = self.of(value, "rows")
        return found

    def find_rows(self, value: Value) -> _C.Rows | None:
        """Return a value's rows; None if it has none."""
        found: _C.Rows | None = self.find(value, "rows")
        return found

    def activation_of(self, value: Value, form: Form) -> _C.Activation:
        """Return an activation in one of its forms; raises as `of`."""
        found: _C.Activation = self.of(value, form)
        return found

    def query_of(self, value: Value) -> _C.Query:
        """Return queries in the layout of a pool; raises as `of`."""
        found: _C.Query = self.of(value, "query")
        return found

    def routing_of(self, value: Value) -> _C.Routing:
        """Return each token's experts; raises as `of`."""
        found: _C.Routing = self.of(value, "routing")
        return found

    def expert_rows(self, columns: int, precision: str, num_experts: int) -> _C.Activation:
        """Take a buffer for rows sorted by expert, until `release`; each expert may start a new tile."""
        kind = ("expert rows", columns, precision, num_experts)
        return self.acquire(kind, lambda: self._native.activation(columns, precision, min_tiles=num_experts))

    def scratch(self, columns: int) -> _C.Rows:
        """Take rows for a call's internal use, until `release`."""
        return self.acquire(("rows", columns), lambda: self._native.rows(columns))

    def head_rows(self, columns: int) -> _C.Rows:
        """Take rows for attention's result. Attention does not write the padding, which must stay zero.

        These buffers are kept apart from products' rows: a product writes the padding, and a NaN there would
        persist into the following steps.
        """
        return self.acquire(("head rows", columns), lambda: self._native.rows(columns))
