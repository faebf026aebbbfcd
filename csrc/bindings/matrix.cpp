// Packing from a file's rows to the panels that kernels read, and unpacking.
#include "bindings/matrix.h"

#include <pybind11/stl.h>

#include <vector>

#include "cpu/step/kernel_sets.h"
#include "cpu/step/pack.h"

namespace tgi {

namespace {

using Bytes = Array<uint8_t>;

// Returns pointers to the rows of all `sources`, in order.
std::vector<const uint8_t*> rows_of(const std::vector<Bytes>& sources, int64_t row_bytes) {
  std::vector<const uint8_t*> rows;
  for (const Bytes& source : sources) {
    check_shape(source, "sources", {-1});
    check(source.size() % row_bytes == 0, "`sources` must be whole rows of ", row_bytes, " bytes");
    for (int64_t at = 0; at < source.size(); at += row_bytes) rows.push_back(source.data() + at);
  }
  return rows;
}

void check_shares(const step::Shares& shares, int64_t num_strips) {
  constexpr int64_t kMaxUnitStrips = 1 << 16, kMaxStrips = int64_t{1} << 40;
  const int64_t unit = shares.unit_strips, all = shares.all_strips;
  check(unit > 0 && unit <= kMaxUnitStrips && num_strips % unit == 0,
        "`unit_strips` must divide the matrix's ", num_strips, ", got ", unit);
  if (all == 0) {
    check(shares.query_strips == 0 && shares.first_strip == 0,
          "`query_strips` and `first_strip` must be 0 where `all_strips` is");
    return;
  }
  check(all >= num_strips && all <= kMaxStrips && all % unit == 0,
        "`all_strips` must be whole units, no less than the matrix's ", num_strips, ", got ", all);
  check(shares.query_strips >= 0 && shares.query_strips <= all && shares.query_strips % unit == 0,
        "`query_strips` must be whole units in [0, ", all, "], got ", shares.query_strips);
  check(shares.first_strip >= 0 && shares.first_strip <= all - num_strips &&
            shares.first_strip % unit == 0,
        "`first_strip` must be whole units in [0, ", all - num_strips, "], got ",
        shares.first_strip);
}

Matrix pack(const std::vector<Bytes>& sources, const std::string& format_name, int64_t columns,
            const Array<int64_t>& order, cpu::Arena& arena, int64_t unit_strips,
            int64_t query_strips, int64_t all_strips, int64_t first_strip) {
  const step::Format format = format_of(format_name);
  const step::FormatInfo& info = step::format_info(format);
  check(info.has_kernel, "`format` must be one that the CPU multiplies by, got ", format_name);
  check_size(columns, "columns");
  check(columns % info.block_columns == 0, "`columns` must be a multiple of ", info.block_columns,
        ", got ", columns);
  check_shape(order, "order", {-1});
  const int64_t num_rows = order.size(), padded = step::padded_columns(columns);
  check(num_rows > 0 && num_rows % step::kStripRows == 0, "`order` must be a multiple of 32, got ",
        num_rows);
  const step::Shares shares = {unit_strips, query_strips, all_strips, first_strip};
  check_shares(shares, num_rows / step::kStripRows);
  const std::vector<const uint8_t*> rows = rows_of(sources, step::file_row_bytes(format, columns));
  std::vector<const uint8_t*> ordered;
  // The number of rows that are not padding, and the end of the last of them.
  int64_t num_true = 0, end = 0;
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t row = order.at(i);
    check(row >= -1 && row < static_cast<int64_t>(rows.size()), "`order`[", i, "] must be in [-1, ",
          rows.size(), "), got ", row);
    ordered.push_back(row < 0 ? nullptr : rows[static_cast<size_t>(row)]);
    num_true += row >= 0;
    if (row >= 0) end = i + 1;
  }
  Matrix matrix = {
      .memory = nullptr,
      .packed = {.data = nullptr, .format = format, .num_rows = num_rows, .num_columns = padded},
      .num_rows = num_true,
      .num_columns = columns,
      .has_padding_last = num_true == end,
  };
  matrix.memory = arena.take(
      cpu::product_of_sizes({num_rows / step::kPanelRows, step::panel_bytes(format, padded)}));
  uint8_t* const out = matrix.memory.get();
  matrix.packed.data = out;
  const py::gil_scoped_release release;
  step::pack_matrix(format, columns, ordered.data(), num_rows, shares, out);
  return matrix;
}

Array<float> unpack(const Matrix& matrix) {
  Array<float> out({matrix.packed.num_rows, matrix.packed.num_columns});
  for (int64_t row = 0; row < matrix.packed.num_rows; ++row) {
    step::unpack_row(matrix.packed, row, 1.0f, out.mutable_data(row, 0));
  }
  return out;
}

}  // namespace

step::Format format_of(const std::string& name) {
  step::Format format;
  check(step::find_format(name, &format), "`format` must be a weight format, got ", name);
  return format;
}

step::Precision precision_of(const std::string& name) {
  for (const auto precision :
       {step::Precision::kInt8, step::Precision::kBF16, step::Precision::kFloat32}) {
    if (name == precision_name(precision)) return precision;
  }
  throw std::invalid_argument("`precision` must be int8, bfloat16 or float32, got " + name);
}

const char* precision_name(step::Precision precision) {
  return precision == step::Precision::kInt8   ? "int8"
         : precision == step::Precision::kBF16 ? "bfloat16"
                                               : "float32";
}

void check_product(const step::PackedMatrix& weight, step::Precision precision,
                   int64_t unit_strips) {
  const bool has_codes = step::format_info(weight.format).is_quantised;
  check(precision == step::Precision::kFloat32 || has_codes ||
            (precision == step::Precision::kBF16 && weight.format == step::Format::kBF16),
        "this weight's format cannot be multiplied in ", precision_name(precision));
  check(weight.num_rows % (unit_strips * step::kStripRows) == 0,
        "the weight must have a multiple of ", unit_strips * step::kStripRows, " rows, got ",
        weight.num_rows);
}

int64_t tiles_of(int64_t num_rows) {
  const int64_t tile_tokens = step::kernels().tile_tokens;
  return (num_rows + tile_tokens - 1) / tile_tokens;
}

void bind_matrices(py::module_& module) {
  py::class_<cpu::Arena>(module, "Arena", "Memory for packed weights, in the order of packing.")
      .def(py::init<>());
  py::class_<Matrix>(module, "Matrix", "A weight in panels; see csrc/cpu/step/packed.h.")
      .def_property_readonly(
          "format", [](const Matrix& m) { return step::format_info(m.packed.format).name; },
          "Name of the format of its weights (for tests and benchmarks).")
      .def_readonly("num_rows", &Matrix::num_rows,
                    "Number of rows without padding (for tests and benchmarks).")
      .def_readonly("num_columns", &Matrix::num_columns)
      .def_property_readonly("num_stored_rows", [](const Matrix& m) { return m.packed.num_rows; })
      .def_property_readonly("nbytes", &Matrix::nbytes)
      .def("unpack", &unpack,
           "Return all rows as stored, padding included, as float32 (for tests and benchmarks).");
  module.def(
      "pack", &pack, py::kw_only(), py::arg("sources").noconvert(), py::arg("format"),
      py::arg("columns"), py::arg("order").noconvert(), py::arg("arena"),
      py::arg("unit_strips") = 1, py::arg("query_strips") = 0, py::arg("all_strips") = 0,
      py::arg("first_strip") = 0,
      "Pack rows: row i of the result is row order[i] of the sources, zeros if that is -1. Each "
      "member packs what it will read; see csrc/cpu/step/shares.h.");
}

}  // namespace tgi
