// Counts the allocations of sampling and log-probabilities. Inside a team's run there must be none,
// because a failed one would end the process. Also compares the lists of the best tokens with a
// sort. Uses the portable passes, which compile in seconds (test_sample_allocations.py).
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/draft_rows.h"
#include "cpu/sample.h"
#include "cpu/step/step.h"
// After the standard headers.
#include "cpu/step/simd_portable.h"
// After the simd type.
#include "cpu/step/sample_rows.h"

namespace {

int64_t num_allocations = 0;

void* counted(size_t bytes) {
  ++num_allocations;
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}

}  // namespace

// The array forms call these.
void* operator new(size_t bytes) { return counted(bytes); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  ++num_allocations;
  return std::malloc(bytes);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace tgi::cpu::step {
const Kernels& kernels() {
  static const Kernels set = [] {
    Kernels portable = {};
    portable.rows = make_row_passes<Portable>();
    return portable;
  }();
  return set;
}
}  // namespace tgi::cpu::step

namespace tgi::cpu {
void team_barrier() {}  // here one thread samples each row
}  // namespace tgi::cpu

namespace {

using tgi::SampleParams;
using tgi::SampleSlot;
using tgi::TokenLogprobsParams;

constexpr int64_t kVocab = 5003;

std::vector<SampleSlot> slots() {
  SampleSlot plain = {};
  plain.temperature = plain.top_p = plain.typical_p = plain.repetition_penalty = 1.0f;
  plain.position = 1;
  plain.flags = tgi::kWantsLogprobs | tgi::kIsProcessed;
  plain.num_top = kVocab;
  std::vector<SampleSlot> all(8, plain);
  all[0].temperature = 0.0f;
  all[1].top_k = 50;
  all[2].top_p = 0.9f;
  all[3].typical_p = 0.8f;
  all[4].top_k = 3000;
  all[4].top_p = 0.99f;
  all[4].min_p = 0.001f;
  all[5].repetition_penalty = 1.5f;
  all[5].frequency_penalty = 0.5f;
  all[6].num_biased = all[6].num_masked = 2;
  all[6].masked_until = 100;
  all[7].num_top = 20;
  return all;
}

// Whether ids and logprobs [n] are in order: best first, and the lowest id first among equals.
bool is_sorted(const int32_t* ids, const float* logprobs, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    if (!(logprobs[i - 1] >= logprobs[i])) return false;
    if (logprobs[i - 1] == logprobs[i] && ids[i - 1] >= ids[i]) return false;
  }
  return true;
}

// Returns the number of allocations of sampling all slots, or -1 if one fails.
int64_t allocations_of_sampling(const std::vector<float>& logits,
                                const std::vector<int32_t>& mask) {
  std::vector<SampleSlot> records = slots();
  const auto num_rows = static_cast<int64_t>(records.size());
  std::vector<int32_t> rows(num_rows), counts(num_rows * kVocab, 0), token_ids(num_rows);
  std::iota(rows.begin(), rows.end(), 0);
  const std::vector<int32_t> listed(num_rows * 2, 7);
  const std::vector<float> biases(num_rows * 2, 1.5f);
  std::vector<int32_t> top_ids(num_rows * kVocab), num_top(num_rows);
  std::vector<float> logprobs(num_rows), top_logprobs(num_rows * kVocab);
  std::vector<uint8_t> scratch(tgi::cpu::sample_scratch_bytes(kVocab, 1) + 64);
  uint8_t* const aligned = scratch.data() + 64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64;
  bool is_finite[16] = {};
  const SampleParams params = {logits.data(),
                               rows.data(),
                               records.data(),
                               counts.data(),
                               listed.data(),
                               biases.data(),
                               listed.data(),
                               mask.data(),
                               token_ids.data(),
                               is_finite,
                               logprobs.data(),
                               top_ids.data(),
                               top_logprobs.data(),
                               num_top.data(),
                               kVocab,
                               2,
                               2,
                               kVocab};
  const int64_t before = num_allocations;
  tgi::cpu::sample(params, tgi::cpu::DraftRows{}, num_rows, aligned, 0, 1);
  const int64_t during = num_allocations - before;
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t first = row * kVocab;
    if (!is_finite[row] || num_top[row] == 0) return -1;
    if (!is_sorted(&top_ids[first], &top_logprobs[first], num_top[row])) return -1;
  }
  return during;
}

// Returns the number of allocations for log-probabilities of rows of logits, or -1 if the best
// tokens differ from a sort's.
int64_t allocations_of_logprobs(const std::vector<float>& logits, int64_t num_rows,
                                int64_t num_top) {
  const std::vector<int32_t> token_ids(num_rows, 3);
  std::vector<float> logprobs(num_rows), top_logprobs(num_rows * num_top + 1);
  std::vector<int32_t> top_ids(num_rows * num_top + 1);
  const TokenLogprobsParams params = {logits.data(),  token_ids.data(),    logprobs.data(),
                                      top_ids.data(), top_logprobs.data(), kVocab,
                                      num_top};
  const int64_t before = num_allocations;
  tgi::cpu::token_logprobs(params, 0, num_rows);
  const int64_t during = num_allocations - before;
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* values = logits.data() + row * kVocab;
    std::vector<int32_t> sorted(kVocab);
    std::iota(sorted.begin(), sorted.end(), 0);
    std::stable_sort(sorted.begin(), sorted.end(),
                     [&](int32_t a, int32_t b) { return values[a] > values[b]; });
    if (!std::equal(sorted.begin(), sorted.begin() + num_top, top_ids.begin() + row * num_top)) {
      return -1;
    }
  }
  return during;
}

}  // namespace

int main() {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> logits(8 * kVocab);
  for (float& x : logits) x = std::round(64 * normal(random)) / 16;  // with ties
  const std::vector<int32_t> mask(8 * ((kVocab + 31) / 32), 0x7FFFFFFF);
  int num_failed = num_allocations == 0;  // fails if the vectors above were not counted
  const auto check = [&](const char* what, int64_t found) {
    if (found == 0) return;
    ++num_failed;
    std::printf("%s: %lld\n", what, static_cast<long long>(found));
  };
  check("sample", allocations_of_sampling(logits, mask));
  for (const int64_t num_top : {0, 1, 20, 300, 5003}) {
    check("token_logprobs", allocations_of_logprobs(logits, 8, num_top));
  }
  std::printf("%d failures\n", num_failed);
  return num_failed == 0 ? 0 : 1;
}
