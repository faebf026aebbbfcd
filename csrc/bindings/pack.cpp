// Adapters of packing: from a file's rows to the panels that the recorded step reads, and back.
#include "cpu/step/pack.h"

#include <torch/library.h>

#include <string>
#include <vector>

#include "bindings/checks.h"
#include "bindings/packed.h"
#include "cpu/team.h"

namespace {

using at::kByte;
using at::kFloat;
using at::kLong;
using at::Tensor;
using tgi::check_columns;
using tgi::check_tensor;
using tgi::format_of;
using tgi::matrix_of;
using tgi::packed_format_of;
namespace step = tgi::step;

// Packs the rows of `sources`, one after the other, in the order `order` (-1: a row of zeros).
void pack_weight(at::TensorList sources, c10::string_view format_name, int64_t columns,
                 const Tensor& order, const Tensor& out) {
  const step::Format format = packed_format_of(format_name);
  check_columns(format, columns);
  check_tensor(order, "order", kLong, {-1});
  const int64_t num_rows = order.size(0);
  TORCH_CHECK(num_rows % step::kStripRows == 0, "`order` must be a multiple of 32, got ", num_rows);
  check_tensor(out, "out", kByte,
               {num_rows / step::kPanelRows * step::panel_bytes(format, columns)});
  const int64_t row_bytes = step::file_row_bytes(format, columns);
  std::vector<const uint8_t*> rows;
  for (const Tensor& source : sources) {
    check_tensor(source, "sources", kByte, {-1});
    TORCH_CHECK(source.size(0) % row_bytes == 0, "`sources` must be whole rows of ", row_bytes,
                " bytes");
    for (int64_t at = 0; at < source.size(0); at += row_bytes) {
      rows.push_back(source.const_data_ptr<uint8_t>() + at);
    }
  }
  std::vector<const uint8_t*> ordered;
  const auto* wanted = order.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < num_rows; ++i) {
    TORCH_CHECK(wanted[i] >= -1 && wanted[i] < static_cast<int64_t>(rows.size()), "`order`[", i,
                "] must be in [-1, ", rows.size(), "), got ", wanted[i]);
    ordered.push_back(wanted[i] < 0 ? nullptr : rows[static_cast<size_t>(wanted[i])]);
  }
  auto* target = out.mutable_data_ptr<uint8_t>();
  tgi::cpu::parallel_range(num_rows / step::kPanelRows, 1, [&](int64_t begin, int64_t end) {
    step::pack_panels(format, columns, ordered.data(), begin, end, target);
  });
}

// Quantises float32 rows to the file format Q8_0 or Q4_0, filled up to whole blocks.
void quantise_rows(const Tensor& values, c10::string_view format_name, const Tensor& out) {
  const step::Format format = format_of(format_name);
  TORCH_CHECK(format == step::Format::kQ8_0 || format == step::Format::kQ4_0,
              "`format` must be Q8_0 or Q4_0, got ", std::string(format_name));
  check_tensor(values, "values", kFloat, {-1, -1});
  const int64_t columns = values.size(1);
  const int64_t bytes = step::file_row_bytes(format, step::padded_columns(columns));
  check_tensor(out, "out", kByte, {values.size(0) * bytes});
  const auto* from = values.const_data_ptr<float>();
  auto* to = out.mutable_data_ptr<uint8_t>();
  tgi::cpu::parallel_range(values.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      step::quantise_row(format, from + row * columns, columns, to + row * bytes);
    }
  });
}

// Rows from `begin` on as float32, as they are stored: padding included.
void unpack_weight(const Tensor& data, c10::string_view format, int64_t columns, int64_t begin,
                   const Tensor& out) {
  const step::PackedMatrix matrix = matrix_of(data, format, columns);
  check_tensor(out, "out", kFloat, {-1, matrix.num_columns});
  TORCH_CHECK(begin >= 0 && begin + out.size(0) <= matrix.num_rows, "rows [", begin, ", ",
              begin + out.size(0), ") must be in [0, ", matrix.num_rows, ")");
  auto* to = out.mutable_data_ptr<float>();
  for (int64_t row = 0; row < out.size(0); ++row) {
    step::unpack_row(matrix, begin + row, 1.0f, to + row * matrix.num_columns);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tgi, m) {
  m.def(
      "pack_weight(Tensor[] sources, str format, int columns, Tensor order, Tensor(a!) out) -> ()",
      pack_weight);
  m.def("quantise_rows(Tensor values, str format, Tensor(a!) out) -> ()", quantise_rows);
  m.def("unpack_weight(Tensor weight, str format, int columns, int begin, Tensor(a!) out) -> ()",
        unpack_weight);
  m.def("packed_panel_bytes(str format, int columns) -> int",
        [](c10::string_view format, int64_t columns) {
          const step::Format parsed = packed_format_of(format);
          check_columns(parsed, columns);
          return step::panel_bytes(parsed, columns);
        });
}
