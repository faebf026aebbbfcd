"""Faults planted in the CUDA kernels of quantised weights, which `test_quant_linear` must catch."""

from __future__ import annotations

import pytest
import torch

from tests.cuda import test_quant_linear
from tests.cuda.faults import Fault, assert_caught

pytestmark = pytest.mark.faults


def fault(what: str, old: str, new: str, kind: str, file: str = "quant_linear.cuh") -> Fault:
    return Fault(what, file, old, new, kind, "quant_linear_bf16.cu")


BEFORE_ACTIVATIONS = """  wait_for_previous_kernel();
  const int num_chunks = Source<S>::num_chunks(p.weight, part);
  Values<Element, S> values(p);
  if (num_chunks > 0) values.load(0);
"""
QUEUE = "quant_linear_queue.cuh"
FAULTS = [
    fault("a row past the last is read", "is_inside && rows_left_ > 1", "is_inside", "bounds", QUEUE),
    fault(
        "a token past the last is read",
        "token + j * 8 < p_.num_tokens",
        "token + j * 8 < p_.num_tokens + 8",
        "bounds",
    ),
    fault(
        "codes past the end of the columns are read",
        "!S::kHasTail || is_inside_;",
        "S::kHasTail;",
        "bounds",
        QUEUE,
    ),
    fault(
        "activations past the end of the columns are read",
        "!S::kHasTail || column",
        "true || column",
        "bounds",
    ),
    fault(
        "activations past the end are not zeros",
        ": uint4{};",
        ": uint4{0x3f803f80u};",
        "result",
    ),
    fault(
        "the queue is read before it is filled",
        "async_wait<S::kStages - 2>()",
        "async_wait<S::kStages - 1>()",
        "async",
    ),
    fault(
        "the last visits commit no group",
        "    async_commit();\n",
        "    if (tiles_left_ < INT_MAX / 2) async_commit();\n",
        "async",
        QUEUE,
    ),
    fault(
        "a thread ends before its copies",
        "  async_wait<0>();  // the last copies have no visit\n",
        "",
        "async",
    ),
    fault(
        "a stage is read before other lanes have copied it",
        "        __syncwarp();  // all see the stage, and none reads the one that is overwritten\n",
        "",
        "race|async|uninit",
    ),
    fault("the order of the slots is forgotten", "ahead ^ row / 2 ^ piece", "ahead ^ piece", "result"),
    fault("the next group's scale", "min(group, last)", "min(group + 1, last)", "result", QUEUE),
    fault("groups past the end are read", "min(group, last)", "min(group, last + 9)", "bounds", QUEUE),
    fault("rows share a scale", "k < 2 ? scale.x : scale.y", "scale.x", "result"),
    fault("the offset is taken off", "fmaf(k < 2 ? offset.x", "fmaf(k < 2 ? -offset.x", "result"),
    fault(
        "sums of activations are overwritten",
        "  __syncwarp();  // none reads those of the chunk before\n",
        "",
        "race",
    ),
    fault("parts are added too early", "    __syncthreads();\n    store", "    store", "race|uninit"),
    fault(
        "rows past the last are written",
        " || row >= p.weight.num_rows) continue",
        ") continue",
        "bounds|blocks|race",
    ),
    fault("one part is left out", "int part = 0; part < kParts", "int part = 1; part < kParts", "result"),
    fault(
        "activations are read before the wait",
        BEFORE_ACTIVATIONS,
        BEFORE_ACTIVATIONS.partition("\n")[2] + "  wait_for_previous_kernel();\n",
        "dependent",
    ),
    fault("threads do not wait for the kernel before", "  wait_for_previous_kernel();\n", "", "dependent"),
    fault("pairs are swapped", "(word >> 4 * i)", "(word >> 4 * (i ^ 1))", "result", file="codes.cuh"),
    fault(
        "the pairs of an operand change places",
        "values.at[piece][j][k], values.at[piece][j][k + 1]);\n      }\n    }\n    if",
        "values.at[piece][j][k + 1], values.at[piece][j][k]);\n      }\n    }\n    if",
        "result",
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    """Rows and columns end within a visit; the first parts have two chunks."""
    assert_caught(fault, lambda device: test_quant_linear.check_product(device, "Q4_1", 3, 11, 1312))


PASSES = [
    fault(
        "sums are cleared before they are read",
        "    if (first + per_pass < tiles.count) __syncthreads();  // the sums are read\n",
        "",
        "race",
    ),
    fault(
        "a pass begins with the activations past the last",
        "values.load(ends_pass ? 0 : chunk + 1);",
        "values.load(chunk + 1);",
        "bounds|result",
    ),
    fault(
        "a pass has the activations of the last chunk",
        "if (!ends_pass || first + per_pass < tiles.count)",
        "if (!ends_pass)",
        "result",
    ),
    fault(
        "a chunk has the activations of the one before",
        "values.load(ends_pass ? 0 : chunk + 1);",
        "values.load(chunk);",
        "result",
    ),
    fault(
        "tiles share scales",
        "scales_ += tiles_.stride * (kTileRows * S::kGroupSlots);",
        "scales_ += 0;",
        "result",
        QUEUE,
    ),
    fault(
        "a pass has the codes of the one before",
        "chunk_ = 0, first_ += tiles_.per_pass;",
        "chunk_ = 0;",
        "result|async",
        QUEUE,
    ),
    fault("tiles share sums", "tile_sums += S::kTileSums", "tile_sums += 0", "result"),
]


@pytest.mark.parametrize("fault", PASSES, ids=str)
def test_a_fault_in_passes_is_caught(fault: Fault) -> None:
    assert_caught(fault, test_quant_linear.check_passes)


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        (1024, fault("scales after the last pass", "if (has_ended) has_scales_ = 0;", "", "bounds", QUEUE)),
        (128, fault("codes beside the columns", "has_ended ? 0 : int(m", "int(m", "bounds", QUEUE)),
    ],
    ids=str,
)
def test_reading_past_the_last_visit_is_caught(columns: int, fault: Fault) -> None:
    assert_caught(fault, lambda device: test_quant_linear.check_product(device, "INT4_128", 3, 16, columns))


def test_a_sum_that_is_not_added_is_caught() -> None:
    assert_caught(
        fault("overwritten", "p.is_added ? *out + sum : sum", "sum", "result"),
        lambda device: test_quant_linear.check_product(
            device, "Q8_0", 3, 19, 384, is_wide=True, is_added=True
        ),
    )


@pytest.mark.parametrize(
    "fault",
    [
        Fault("other bits", "codes.cuh", "0x70007000u", "0x30003000u", "result", "quant_linear.cu"),
        Fault("denormal scales", "codes.cuh", "e < 2 ?", "e < 1 ?", "result", "quant_linear.cu"),
        Fault("a half", "codes.cuh", "two.y * 0x1p127f", "two.y * 0x1p126f", "result", "quant_linear.cu"),
    ],
    ids=str,
)
def test_a_fault_in_reading_mxfp4_is_caught(fault: Fault) -> None:
    assert_caught(fault, lambda device: test_quant_linear.check_every_mxfp4(device, torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "swapped"),
    [
        ("F8_64", ("uint16_t(word >> 16 * i)", "uint16_t(word >> (16 - 16 * i))")),
        ("Q6_K", ("0x7440u + 2 * i + k", "0x7441u + 2 * i - k")),
        ("MXFP4", ("codes << (12 - 4 * k) & 0x80008000u", "codes << 4 * k & 0x80008000u")),
    ],
    ids=str,
)
def test_codes_of_a_word_in_the_wrong_order_are_caught(name: str, swapped: tuple[str, str]) -> None:
    assert_caught(
        fault("swapped", *swapped, "result", "codes.cuh"),
        lambda device: test_quant_linear.check_product(device, name, 3, 11, 1280),
    )


def test_floats_of_a_decoded_word_in_the_wrong_order_are_caught() -> None:
    swapped = Fault(
        "swapped halves", "codes.cuh", "(k % 2 * 16)", "((k + 1) % 2 * 16)", "result", "quant_linear.cu"
    )
    assert_caught(swapped, lambda device: test_quant_linear.check_decoded(device, "F8_64"))
