"""Host time of a GPU step: the time to launch Llama-3-8B's operators when these do nothing.

    python -m bench.gpu_host [--layers 32] [--batch 32] [--prompt 512] [--weights int4]

Needs no GPU, only g++: the program of csrc/bindings/cuda is compiled together with operators that compute
nothing, on torch's meta device. Prints one JSON object: the number of operators in a mixed step, and the
median microseconds to launch them all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time

import torch

from bench import gpu_model, gpu_timing
from bench.gpu_model import SHAPE, StepKind
from tests.emulation import program

# An operator returns the tensor that it has written, if any.
_NOTHING = """
#include <torch/library.h>

namespace {

void do_nothing(const c10::OperatorHandle& op, c10::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  c10::IValue written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* alias = arguments[i].alias_info();
    if (alias != nullptr && alias->isWrite()) written = (*stack)[first + i];
  }
  stack->resize(first);
  if (!op.schema().returns().empty()) stack->push_back(std::move(written));
}

}  // namespace
"""
_TORCH_S = ("mm.out", "mm.dtype_out", "addmm.dtype_out", "add_.Tensor", "copy_")


def _module(names: list[str]) -> str:
    def registered(library: str, operators: list[str]) -> str:
        implement = "torch::CppFunction::makeFromBoxedFunction<&do_nothing>()"
        lines = [f'  m.impl("{name}", {implement});' for name in operators]
        return "\n".join([f"TORCH_LIBRARY_IMPL({library}, Meta, m) {{", *lines, "}"])

    return "\n".join(
        [program.MODULE, _NOTHING, registered("tgi_cuda", names), registered("aten", [*_TORCH_S])]
    )


def main() -> None:
    """Time a mixed step and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=SHAPE.num_layers)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    definitions = torch.library.Library("tgi_cuda", "DEF")
    schemas = program.schemas()
    for schema in schemas:
        definitions.define(schema)
    sized = "attention_workspace_bytes"
    definitions.impl(sized, lambda *sizes: 1024, "CompositeExplicitAutograd")
    names = [schema.partition("(")[0] for schema in schemas]
    program.install(_module([name for name in names if name not in (sized, "set_dependent_launches")]))
    gpu_timing.DEVICE = torch.device("meta")
    config = dataclasses.replace(SHAPE, layers=SHAPE.layers[:1] * options.layers)
    step = gpu_model.make_step(StepKind(options.batch, 1024, options.weights, prompt=options.prompt), config)
    for _ in range(20):
        step.call()
    times = []
    for _ in range(options.steps):
        start = time.perf_counter()
        step.call()
        times.append((time.perf_counter() - start) * 1e6)
    row = {"layers": options.layers, "batch": options.batch, "prompt": options.prompt}
    row |= {"weights": options.weights, "operators": step.num_calls, "us": round(statistics.median(times), 1)}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
