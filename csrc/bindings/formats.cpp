// Adapters of the table of weight formats and of its readers: rows as float32, rows for CUDA.
#include "cpu/step/formats.h"

#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <optional>

#include "bindings/checks.h"
#include "bindings/module_formats.h"
#include "bindings/packed.h"
#include "cpu/step/block_reader.h"
#include "cpu/team.h"

namespace {

using at::kByte;
using at::kFloat;
using at::Tensor;
using tgi::check_columns;
using tgi::check_tensor;
using tgi::format_of;
namespace py = pybind11;
namespace step = tgi::step;

// Checks whole rows, flat, and returns how many there are.
int64_t rows_of(const Tensor& data, step::Format format, int64_t columns) {
  check_columns(format, columns);
  check_tensor(data, "data", kByte, {-1});
  const int64_t bytes = step::file_row_bytes(format, columns);
  TORCH_CHECK(data.size(0) % bytes == 0, "`data` must be whole rows of ", bytes, " bytes, got ",
              data.size(0));
  return data.size(0) / bytes;
}

// A file's rows as float32, equal to ggml's to the bit.
void decode_rows(const Tensor& data, c10::string_view format_name, const Tensor& out) {
  const step::Format format = format_of(format_name);
  check_tensor(out, "out", kFloat, {-1, -1});
  const int64_t columns = out.size(1), bytes = step::file_row_bytes(format, columns);
  const int64_t num_rows = rows_of(data, format, columns);
  check_tensor(out, "out", kFloat, {num_rows, columns});
  const auto* from = data.const_data_ptr<uint8_t>();
  auto* to = out.mutable_data_ptr<float>();
  tgi::cpu::parallel_range(num_rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      step::decode_row(format, from + row * bytes, columns, to + row * columns);
  });
}

// A file's rows for CUDA: see `RepackedInfo`.
void repack_rows(const Tensor& data, c10::string_view format_name, int64_t columns,
                 const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& offsets) {
  const step::Format format = format_of(format_name);
  const step::RepackedInfo& info = step::format_info(format).repacked;
  TORCH_CHECK(info.bits != 0, "`format` must be one of codes, got ", std::string(format_name));
  TORCH_CHECK(offsets.has_value() == info.has_offsets, "`offsets` must be ",
              info.has_offsets ? "given" : "None", " for ", std::string(format_name));
  const int64_t num_rows = rows_of(data, format, columns);
  const int64_t bytes = step::file_row_bytes(format, columns);
  const int64_t code_bytes = columns * info.bits / 8, num_groups = columns / info.group_columns;
  check_tensor(codes, "codes", kByte, {num_rows, code_bytes});
  check_tensor(scales, "scales", kFloat, {num_rows, num_groups});
  if (offsets) check_tensor(*offsets, "offsets", kFloat, {num_rows, num_groups});
  const auto* from = data.const_data_ptr<uint8_t>();
  auto* to_codes = codes.mutable_data_ptr<uint8_t>();
  auto* to_scales = scales.mutable_data_ptr<float>();
  auto* to_offsets = offsets ? offsets->mutable_data_ptr<float>() : nullptr;
  tgi::cpu::parallel_range(num_rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      step::repack_row(format, from + row * bytes, columns, to_codes + row * code_bytes,
                       to_scales + row * num_groups,
                       to_offsets == nullptr ? nullptr : to_offsets + row * num_groups);
    }
  });
}

py::list weight_formats() {
  py::list rows;
  for (int i = 0; i < step::kNumFormats; ++i) {
    const step::FormatInfo& info = step::format_info(static_cast<step::Format>(i));
    py::dict row;
    row["name"] = info.name;
    row["ggml_type"] = info.ggml_type < 0 ? py::object(py::none()) : py::int_(info.ggml_type);
    row["block_columns"] = info.block_columns;
    row["block_bytes"] = info.block_bytes;
    row["is_quantised"] = info.is_quantised;
    row["has_kernel"] = info.has_kernel;
    row["repacked_bits"] = info.repacked.bits;
    row["repacked_zero"] = info.repacked.zero;
    row["repacked_group_columns"] = info.repacked.group_columns;
    row["repacked_has_offsets"] = info.repacked.has_offsets;
    row["repacked_has_half_scales"] = info.repacked.has_half_scales;
    row["repacked_is_float8"] = info.repacked.is_float8;
    rows.append(row);
  }
  return rows;
}

}  // namespace

void tgi::bind_formats(py::module_& module) {
  module.def("weight_formats", &weight_formats, "Return the table of weight formats, a dict each.");
}

TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def("decode_rows(Tensor data, str format, Tensor(a!) out) -> ()", decode_rows);
  m.def(
      "repack_rows(Tensor data, str format, int columns, Tensor(a!) codes, Tensor(b!) scales, "
      "Tensor(c!)? offsets) -> ()",
      repack_rows);
}
