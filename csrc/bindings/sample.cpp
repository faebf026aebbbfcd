#include "bindings/sample.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/sample.h"
#include "cpu/team.h"

namespace tgi {

SampleArrays::SampleArrays(Array<uint8_t> records, Array<int32_t> counts)
    : records_(std::move(records)), counts_(std::move(counts)) {
  check_shape(records_, "records", {-1, static_cast<int64_t>(sizeof(SampleSlot))});
  check_shape(counts_, "counts", {records_.shape(0), -1});
  check_positive(counts_.shape(1), "vocab");
  params_.records = reinterpret_cast<SampleSlot*>(records_.mutable_data());
  params_.counts = counts_.mutable_data();
  params_.vocab = counts_.shape(1);
}

void SampleArrays::set_lists(Array<int32_t> biased_ids, Array<float> biased_values,
                             Array<int32_t> masked_ids) {
  check_shape(biased_ids, "biased_ids", {num_slots(), -1});
  check_shape(biased_values, "biased_values", {num_slots(), biased_ids.shape(1)});
  check_shape(masked_ids, "masked_ids", {num_slots(), -1});
  biased_ids_ = std::move(biased_ids);
  biased_values_ = std::move(biased_values);
  masked_ids_ = std::move(masked_ids);
  params_.biased_ids = biased_ids_.data();
  params_.biased_values = biased_values_.data();
  params_.masked_ids = masked_ids_.data();
  params_.biased_stride = biased_ids_.shape(1);
  params_.masked_stride = masked_ids_.shape(1);
}

void SampleArrays::check_slots(const std::vector<int32_t>& slots,
                               const std::vector<int32_t>& drafts) const {
  check_range(slots.data(), static_cast<int64_t>(slots.size()), num_slots(), "slots");
  check(drafts.empty() || drafts.size() == slots.size(), "`drafts` must have ", slots.size(),
        " elements, got ", drafts.size());
  std::vector<bool> is_taken(static_cast<size_t>(num_slots()));
  for (size_t row = 0; row < slots.size(); ++row) {
    const int32_t slot = slots[row];
    if (!drafts.empty() && drafts[row] >= 0) {
      check(row > 0 && slots[row - 1] == slot && drafts[row] < vocab(), "`drafts`[", row,
            "] must be in [0, ", vocab(), "), after a row of its slot, got ", drafts[row]);
      continue;
    }
    check(!is_taken[static_cast<size_t>(slot)], "`slots` must differ, got ", slot, " twice");
    is_taken[static_cast<size_t>(slot)] = true;
    check_record(slot);
  }
}

void SampleArrays::check_record(int32_t slot) const {
  const SampleSlot& found = record(slot);
  check(found.temperature >= 0, "slot ", slot, " has the temperature ", found.temperature);
  for (const float share : {found.top_p, found.min_p, found.typical_p}) {
    check(share >= 0 && share <= 1, "slot ", slot, " has top_p ", found.top_p, ", min_p ",
          found.min_p, ", typical_p ", found.typical_p, ", which must be in [0, 1]");
  }
  check(found.num_biased >= 0 && found.num_biased <= params_.biased_stride, "slot ", slot, " has ",
        found.num_biased, " biased ids in a list of ", params_.biased_stride);
  check(found.num_masked >= 0 && found.num_masked <= params_.masked_stride, "slot ", slot, " has ",
        found.num_masked, " masked ids in a list of ", params_.masked_stride);
  check_range(params_.biased_ids + slot * params_.biased_stride, found.num_biased, params_.vocab,
              "biased_ids");
  check_range(params_.masked_ids + slot * params_.masked_stride, found.num_masked, params_.vocab,
              "masked_ids");
}

void SampleArrays::reserve(int num_members) {
  if (num_scratch_ >= num_members) return;
  scratch_ = cpu::allocate(cpu::sample_scratch_bytes(vocab(), num_members));
  num_scratch_ = num_members;
}

void Samples::prepare(const SampleArrays& state) {
  state.check_slots(slots, drafts);
  ahead.resize(drafts.size());
  for (size_t row = 0; row < drafts.size(); ++row) {
    ahead[row] = drafts[row] < 0 ? 0 : ahead[row - 1] + 1;
  }
  for (const int32_t slot : slots) {
    max_top =
        std::max<int64_t>(max_top, std::min<int64_t>(state.record(slot).num_top, state.vocab()));
  }
  const size_t rows = slots.size(), top = rows * static_cast<size_t>(max_top);
  token_ids.resize(rows);
  is_finite = std::make_unique<bool[]>(rows);
  is_accepted = std::make_unique<bool[]>(rows);
  logprobs.resize(rows);
  top_ids.resize(top);
  top_logprobs.resize(top);
  num_top.resize(rows);
}

py::tuple Samples::arrays() const {
  const int64_t rows = num_rows();
  py::array_t<bool> finite(rows), accepted(rows);
  std::copy_n(is_finite.get(), rows, finite.mutable_data());
  std::copy_n(is_accepted.get(), rows, accepted.mutable_data());
  return py::make_tuple(py::array_t<int32_t>(rows, token_ids.data()), std::move(finite),
                        py::array_t<float>(rows, logprobs.data()),
                        py::array_t<int32_t>({rows, max_top}, top_ids.data()),
                        py::array_t<float>({rows, max_top}, top_logprobs.data()),
                        py::array_t<int32_t>(rows, num_top.data()), std::move(accepted));
}

SampleCall::SampleCall(SampleArrays& state, Samples& samples, const int32_t* mask)
    : state_(state), samples_(samples), params_(state.params()), num_rows_(samples.num_rows()) {
  samples.prepare(state);
  params_.slots = samples.slots.data();
  params_.mask = mask;
  params_.token_ids = samples.token_ids.data();
  params_.is_finite = samples.is_finite.get();
  params_.logprobs = samples.logprobs.data();
  params_.top_ids = samples.top_ids.data();
  params_.top_logprobs = samples.top_logprobs.data();
  params_.num_top = samples.num_top.data();
  params_.max_top = samples.max_top;
}

void SampleCall::run(int member, int num_members) const {
  cpu::sample(params_, samples_.draft_rows(), num_rows_, state_.scratch(), member, num_members);
}

void SampleCall::finish() {
  cpu::accept_drafts(params_, samples_.draft_rows(), num_rows_, samples_.is_accepted.get());
}

const int32_t* mask_data(const std::optional<Array<int32_t>>& mask, int64_t num_rows,
                         int64_t vocab) {
  if (!mask) return nullptr;
  check_shape(*mask, "mask", {num_rows, (vocab + 31) / 32});
  return mask->data();
}

namespace {

// Sampling costs about as much per token of a row as this many multiplications.
constexpr int64_t kTokenWork = 16;

py::tuple sample(const Array<float>& logits, const std::vector<int32_t>& slots, SampleArrays& state,
                 const std::optional<Array<int32_t>>& mask, const std::vector<int32_t>& drafts) {
  Samples samples;
  samples.slots = slots;
  samples.drafts = drafts;
  check_shape(logits, "logits", {samples.num_rows(), state.vocab()});
  SampleCall call(state, samples, mask_data(mask, samples.num_rows(), state.vocab()));
  call.set_logits(logits.data());
  {
    const py::gil_scoped_release release;
    const auto reserve = [&](int num_members) { call.reserve(num_members); };
    const auto body = [&](int member, int num_members) { call.run(member, num_members); };
    if (samples.num_rows() > 0)
      cpu::run_small(kTokenWork * samples.num_rows() * state.vocab(), reserve, body);
    call.finish();
  }
  return samples.arrays();
}

py::tuple token_logprobs(const Array<float>& logits, const Array<int32_t>& token_ids,
                         int64_t num_top) {
  check_shape(logits, "logits", {-1, -1});
  const int64_t rows = logits.shape(0), vocab = logits.shape(1);
  check_shape(token_ids, "token_ids", {rows});
  check_range(token_ids.data(), rows, vocab, "token_ids");
  check(num_top >= 0 && num_top <= vocab, "`num_top` must be in [0, ", vocab, "], got ", num_top);
  Array<float> logprobs(rows), top_logprobs({rows, num_top});
  Array<int32_t> top_ids({rows, num_top});
  const TokenLogprobsParams params = {
      .logits = logits.data(),
      .token_ids = token_ids.data(),
      .logprobs = logprobs.mutable_data(),
      .top_ids = top_ids.mutable_data(),
      .top_logprobs = top_logprobs.mutable_data(),
      .vocab = vocab,
      .num_top = num_top,
  };
  {
    const py::gil_scoped_release release;
    cpu::parallel_range(
        rows, 1, [&](int64_t begin, int64_t end) { cpu::token_logprobs(params, begin, end); });
  }
  return py::make_tuple(logprobs, top_ids, top_logprobs);
}

}  // namespace

py::object sampled_of(const Samples& samples, size_t i) {
  py::object logprob = py::none(), top = py::none();
  if (!std::isnan(samples.logprobs[i])) {  // the slot wants log-probabilities
    logprob = py::float_(samples.logprobs[i]);
    py::list pairs(samples.num_top[i]);
    for (size_t k = 0; k < pairs.size(); ++k) {
      const size_t at = i * static_cast<size_t>(samples.max_top) + k;
      pairs[k] = py::make_tuple(samples.top_ids[at], samples.top_logprobs[at]);
    }
    top = std::move(pairs);
  }
  return py::make_tuple(samples.token_ids[i], std::move(logprob), std::move(top),
                        bool{samples.is_finite[i]});
}

void bind_sampling(py::module_& module) {
  py::class_<SampleArrays, std::shared_ptr<SampleArrays>>(module, "SampleArrays",
                                                          "The arrays of tgi_asgi.ops.SampleState.")
      .def(py::init<Array<uint8_t>, Array<int32_t>>(), py::arg("records").noconvert(),
           py::arg("counts").noconvert())
      .def("check_record", &SampleArrays::check_record, py::arg("slot"))
      .def("set_lists", &SampleArrays::set_lists, py::arg("biased_ids").noconvert(),
           py::arg("biased_values").noconvert(), py::arg("masked_ids").noconvert());
  module.def("sample", &sample, py::arg("logits").noconvert(), py::arg("slots"), py::arg("state"),
             py::arg("mask").noconvert() = py::none(), py::arg("drafts") = std::vector<int32_t>(),
             "See tgi_asgi.ops.sample.");
  module.def("token_logprobs", &token_logprobs, py::arg("logits").noconvert(),
             py::arg("token_ids").noconvert(), py::arg("num_top"),
             "See tgi_asgi.ops.token_logprobs.");
}

}  // namespace tgi
