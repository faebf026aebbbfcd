"""Steps between the event loop and the thread that computes them; csrc/bindings/step_queue.h says how.

The extension's own classes: a step of plain rows passes through them without Python.
"""

from tgi_asgi._C import PlanError, RowLimits, StepQueue, flatten_rows

__all__ = ["PlanError", "RowLimits", "StepQueue", "flatten_rows"]
