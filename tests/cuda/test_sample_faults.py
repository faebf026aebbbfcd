"""Faults planted in the CUDA kernels of sampling, which the checks of test_sample.py must find."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cuda.faults import Fault, assert_caught
from tests.cuda.test_sample import WAYS, check, run
from tests.emulation.device import Device
from tgi_asgi.types import SamplingParams

pytestmark = pytest.mark.faults

FAULTS = [
    Fault(
        "bins are cleared while others count",
        "sample_rows.cuh",
        "    clear_bins(shared);\n    __syncthreads();",
        "    clear_bins(shared);",
        "race",
    ),
    Fault(
        "counts are added without an atomic",
        "sample_rows.cuh",
        "const uint32_t before = atomicAdd(&shared.low[bin], low);",
        "const uint32_t before = shared.low[bin];\n  shared.low[bin] = before + low;",
        "race",
    ),
    Fault(
        "the carry is lost",
        "sample_rows.cuh",
        "before + low < before ? 1 : 0",
        "before + low < before ? 0 : 0",
        "result|uninit",
    ),
    Fault(
        "elements that the list has no room for are forgotten",
        "sample_rows.cuh",
        "const bool is_listed = shared.num_listed <= kListed;",
        "const bool is_listed = true;",
        "bounds|result|ub",
    ),
    Fault(
        "elements of other bins are counted where there is no list",
        "sample_rows.cuh",
        "if (!is_listed && linear_bin(distance) != linear) continue;",
        "",
        "result",
    ),
    Fault(
        "the end of a row is left out",
        "sample_rows.cuh",
        "for (; k < count; k += Batch * kStep)",
        "for (; k + 3 < count; k += Batch * kStep)",
        "result",
    ),
    Fault(
        "the bin found is read too soon",
        "sample_rows.cuh",
        "    shared.before = before;\n  }\n  __syncthreads();",
        "    shared.before = before;\n  }",
        "race|uninit",
    ),
    Fault(
        "one token too many is kept",
        "sample_rows.cuh",
        "before < target && target <= upto",
        "before <= target && target < upto",
        "result|race|uninit",
    ),
    Fault(
        "the bias is added before the logits are there",
        "sample_filter.cuh",
        "    out[i] = x;\n  }\n  __syncthreads();",
        "    out[i] = x;\n  }",
        "race",
    ),
    Fault(
        "the mask of another row",
        "sample_filter.cuh",
        "all.base.mask + index * ((all.base.vocab + 31) / 32)",
        "all.base.mask + index * (all.base.vocab / 32)",
        "result",
    ),
    Fault(
        "a row without a mask takes one",
        "sample_filter.cuh",
        "const bool is_valid = index >= 0 && index < all.num_masks;",
        "const bool is_valid = index < all.num_masks;",
        "bounds",
    ),
    Fault("sampling forgets the choice", "sample_filter.cuh", "uint32_t(slot.choice)", "0u", "result"),
    Fault(
        "sampling among few forgets the choice",
        "sample_candidates.cuh",
        "uint32_t(slot.choice)",
        "0u",
        "result",
    ),
    Fault(
        "top-p over the whole vocabulary",
        "sample_filter.cuh",
        "if (!(score >= filter.floor)) return Weight{0};",
        "if (step != kTopP && !(score >= filter.floor)) return Weight{0};",
        "result",
    ),
    Fault(
        "a part is forgotten",
        "sample_parts.cuh",
        "if (lane < num_parts) own = work.stats[lane];",
        "if (lane < max(num_parts - 1, 1)) own = work.stats[lane];",
        "result|bounds|ub",
    ),
    Fault(
        "parts overlap",
        "sample_parts.cuh",
        "min(length, n - first)",
        "min(length + 4, n - first)",
        "result|blocks",
    ),
    Fault(
        "parts are merged before all have ended",
        "sample_parts.cuh",
        "  if (row.needs_scores(slot)) clear_part(work.scores, part, split.num_parts);",
        "  const MergedStats early = merge_stats(work, split.num_parts);\n"
        "  if (threadIdx.x == 0) work.winners[part].id = early.stats.first;\n"
        "  if (row.needs_scores(slot)) clear_part(work.scores, part, split.num_parts);",
        "blocks|race",
    ),
    Fault(
        "a histogram is added without an atomic",
        "sample_parts.cuh",
        "atomicAdd(&histogram.weights[bin], weight);",
        "histogram.weights[bin] += weight;",
        "blocks",
    ),
    Fault(
        "the bin where the set ends is not listed",
        "sample_candidates.cuh",
        "row.bin(value) <= last",
        "row.bin(value) < last",
        "result|bounds|uninit",
    ),
    Fault(
        "top-p is a share of what is kept",
        "sample_candidates.cuh",
        "    total = 0;\n  }\n  if (slot.top_p",
        "  }\n  total = 0;\n  if (slot.top_p",
        "result",
    ),
    Fault(
        "the k-th group is left out",
        "sample_candidates.cuh",
        "find_bin(Weight(count), shared);",
        "find_bin(max(Weight(count), Weight{2}) - 1, shared);",
        "result",
    ),
    Fault(
        "a group's later runs are not read",
        "sample_candidates.cuh",
        "ceil_divide(length, kRowThreads * 4) * split.lanes",
        "min(ceil_divide(length, kRowThreads * 4), 1) * split.lanes",
        "result",
    ),
    Fault(
        "a group is the one before",
        "sample_candidates.cuh",
        "group % groups_per_part * split.lanes",
        "max(group % groups_per_part - 1, 0) * split.lanes",
        "result|bounds|uninit|ub",
    ),
    Fault(
        "the maxima of a group's threads are not merged",
        "sample_parts.cuh",
        "for (int lanes = 1; lanes < split.lanes; lanes *= 2)",
        "for (int lanes = 1; lanes < 1; lanes *= 2)",
        "result|bounds|uninit|ub",
    ),
    Fault(
        "equal candidates take one place",
        "sample_candidates.cuh",
        "|| (its == value && other < own)",
        "",
        "race|uninit|result",
    ),
    Fault(
        "sorted candidates are read too soon",
        "sample_candidates.cuh",
        "    candidates.places[place] = own;\n  }\n  __syncthreads();",
        "    candidates.places[place] = own;\n  }",
        "race|uninit",
    ),
    Fault(
        "the second 32 candidates begin from nothing",
        "sample_candidates.cuh",
        "before += __shfl_sync(kAllLanes, upto, kWarpSize - 1);",
        "before = 0 * __shfl_sync(kAllLanes, upto, kWarpSize - 1);",
        "result",
    ),
    Fault(
        "another warp sees the floor too soon",
        "sample_candidates.cuh",
        "      candidates.winner = winner;\n    }\n  }\n  __syncthreads();",
        "      candidates.winner = winner;\n    }\n  }",
        "race|uninit",
    ),
    Fault(
        "the slot moves on while others read it",
        "sample.cu",
        "  __syncthreads();  // all threads have read the slot\n",
        "",
        "race",
    ),
    Fault(
        "ties go to the highest id",
        "sample_rows.cuh",
        "|| (x == best && i < best_id)",
        "|| x == best",
        "result|order",
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    def everything(device: Device) -> None:
        logits = torch.randn(2, 130) * 2
        for sampling in (WAYS[7], WAYS[10]):
            check(device, logits[:1], [sampling])
        for _ in range(2):
            check(device, logits[:1], [SamplingParams(temperature=4.0)])
        mask = torch.tensor([[-1, -1, -1, -1, -1], [-1, 0, 0, 0, 0]], dtype=torch.int32)
        biased = SamplingParams(logit_bias=((3, 5.0), (9, -2.5)), top_k=9)
        check(device, logits, [biased] * 2, mask=mask, mask_rows=(0, 1))
        check(device, logits, [biased] * 2, mask=mask, mask_rows=(-1, 1))
        check(device, torch.zeros(1, 1100), [SamplingParams()])
        check(device, torch.arange(130.0)[None] // 3, [SamplingParams(top_k=8)])
        carried = torch.cat([torch.zeros(1), -0.5 - torch.arange(600) * 1e-6, torch.full((2,), -9.0)])[None]
        check(device, carried, [SamplingParams(top_p=0.95)])
        if fault.file in ("sample_candidates.cuh", "sample_parts.cuh"):
            spread = torch.randn(1, 21003) * 3
            spread[0, 6000:6008] = spread.max() + 1 + torch.arange(8) / 4  # two threads of a group
            for way in (WAYS[7], SamplingParams(top_k=70, top_p=0.99), SamplingParams(top_k=1)):
                check(device, spread, [way])
        if "list" in fault.what:
            crowded = torch.cat([torch.randperm(2200).float() * 1e-6, torch.randn(40) - 1])[None]
            check(device, crowded, [SamplingParams(top_k=2100)])
        check(device, torch.arange(131.0)[None], [SamplingParams(temperature=0)])
        shared = torch.arange(600.0)[None] / 100  # two blocks share it, with the best of all in the second
        for way in (SamplingParams(temperature=0), SamplingParams(top_p=0.5), SamplingParams(seed=1)):
            check(device, shared, [way])
        run(device, shared, [SamplingParams(temperature=0)], banned=(0, 7))

    assert_caught(replace(fault, kernel="sample.cu"), everything)
