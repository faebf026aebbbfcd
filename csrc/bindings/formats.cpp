// Bindings of the table of weight formats and its readers in tgi_asgi._C: rows as float32, rows for
// CUDA.
#include "cpu/step/formats.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include "bindings/matrix.h"
#include "cpu/step/block_reader.h"
#include "cpu/step/pack.h"
#include "cpu/step/quantise.h"
#include "cpu/team.h"

namespace tgi {

namespace {

using Bytes = Array<uint8_t>;

// Below this many numbers, the calling thread converts alone: the team may be computing a step,
// which an adapter's many small matrices would each wait for.
constexpr int64_t kAlone = int64_t{1} << 20;

// Checks that `data` is flat and consists of whole rows; returns their number.
int64_t count_rows(const Bytes& data, step::Format format, int64_t columns) {
  const int64_t unit = step::format_info(format).block_columns;
  check_size(columns, "columns");
  check(columns > 0 && columns % unit == 0, "`columns` must be a multiple of ", unit, ", got ",
        columns);
  check_shape(data, "data", {-1});
  const int64_t bytes = step::file_row_bytes(format, columns);
  check(data.size() % bytes == 0, "`data` must be whole rows of ", bytes, " bytes, got ",
        data.size());
  return data.size() / bytes;
}

// Calls visit(row, its bytes) for all rows, on several threads.
template <class Visit>
void each_row(const Bytes& data, int64_t num_rows, int64_t columns, const Visit& visit) {
  const int64_t bytes = data.size() / std::max<int64_t>(num_rows, 1);
  const uint8_t* const from = data.data();
  const py::gil_scoped_release release;
  cpu::parallel_range(
      num_rows, 1,
      [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) visit(row, from + row * bytes);
      },
      kAlone / columns + 1);
}

// Calls visit(row, first column, decoded values, their number) for pieces of all rows. Nothing is
// allocated, because an exception would end a thread of the team, and with it the process.
template <class Visit>
void each_piece(const Bytes& data, step::Format format, int64_t num_rows, int64_t columns,
                const Visit& visit) {
  constexpr int64_t kPiece = 1024;  // a multiple of every format's block
  each_row(data, num_rows, columns, [&](int64_t row, const uint8_t* bytes) {
    float values[kPiece];
    for (int64_t first = 0; first < columns; first += kPiece) {
      const int64_t count = std::min(kPiece, columns - first);
      step::decode_row(format, bytes + step::file_row_bytes(format, first), count, values);
      visit(row, first, values, count);
    }
  });
}

Array<float> decode_rows(const Bytes& data, const std::string& format_name, int64_t columns) {
  const step::Format format = format_of(format_name);
  const int64_t num_rows = count_rows(data, format, columns);
  Array<float> out({num_rows, columns});
  float* const to = out.mutable_data();
  each_row(data, num_rows, columns, [&](int64_t row, const uint8_t* bytes) {
    step::decode_row(format, bytes, columns, to + row * columns);
  });
  return out;
}

// Rounds to nearest, ties to even, and keeps denormals, unlike the kernels' activations.
uint16_t bfloat16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

Array<uint16_t> decode_bfloat16(const Bytes& data, const std::string& format_name,
                                int64_t columns) {
  const step::Format format = format_of(format_name);
  const int64_t num_rows = count_rows(data, format, columns);
  Array<uint16_t> out({num_rows, columns});
  uint16_t* const to = out.mutable_data();
  each_piece(data, format, num_rows, columns,
             [&](int64_t row, int64_t first, const float* values, int64_t count) {
               std::transform(values, values + count, to + row * columns + first, bfloat16_of);
             });
  return out;
}

std::optional<Array<uint16_t>> decode_halves(const Bytes& data, const std::string& format_name,
                                             int64_t columns, const Array<int64_t>& places) {
  const step::Format format = format_of(format_name);
  const int64_t num_rows = count_rows(data, format, columns);
  check_shape(places, "places", {columns});
  check_range(places.data(), columns, columns, "places");
  Array<uint16_t> out({num_rows, columns});
  uint16_t* const to = out.mutable_data();
  const int64_t* const at = places.data();
  std::atomic<bool> is_finite = true;
  each_piece(data, format, num_rows, columns,
             [&](int64_t row, int64_t first, const float* values, int64_t count) {
               int largest = 0;
               for (int64_t i = 0; i < count; ++i) {
                 const uint16_t half = step::float_to_half(values[i]);
                 largest = std::max(largest, half & 0x7FFF);
                 to[row * columns + at[first + i]] = half;
               }
               if (largest >= 0x7C00) is_finite = false;
             });
  if (!is_finite) return std::nullopt;
  return out;
}

Bytes quantise(const Bytes& data, const std::string& format_name, int64_t columns,
               const std::string& to_name) {
  const step::Format format = format_of(format_name), target = format_of(to_name);
  check(target == step::Format::kQ8_0 || target == step::Format::kQ4_0,
        "`to` must be Q8_0 or Q4_0, got ", to_name);
  const int64_t num_rows = count_rows(data, format, columns);
  const int64_t row_bytes = step::file_row_bytes(target, step::padded_columns(columns));
  Bytes out({num_rows * row_bytes});
  uint8_t* const to = out.mutable_data();
  std::atomic<bool> is_done = true;
  each_piece(data, format, num_rows, columns,
             [&](int64_t row, int64_t first, const float* values, int64_t count) {
               uint8_t* const blocks = to + row * row_bytes + step::file_row_bytes(target, first);
               if (!step::quantise_row(target, values, count, blocks)) is_done = false;
             });
  check(is_done, "the weight has a number that is NaN, infinite or too large for a float16 scale");
  return out;
}

Array<uint16_t> bfloat16_bits(const Array<float>& values) {
  const std::vector<int64_t> shape(values.shape(), values.shape() + values.ndim());
  Array<uint16_t> out(shape);
  const int64_t piece = int64_t{1} << 12, size = values.size();
  const float* const from = values.data();
  uint16_t* const to = out.mutable_data();
  const py::gil_scoped_release release;
  cpu::parallel_range((size + piece - 1) / piece, 1,
                      [&](int64_t begin, int64_t end) {
                        std::transform(from + begin * piece, from + std::min(end * piece, size),
                                       to + begin * piece, bfloat16_of);
                      },
                      kAlone / piece);
  return out;
}

py::tuple repack_rows(const Bytes& data, const std::string& format_name, int64_t columns) {
  const step::Format format = format_of(format_name);
  const step::RepackedInfo& info = step::format_info(format).repacked;
  check(info.bits != 0, "`format` must be one of codes, got ", format_name);
  const int64_t num_rows = count_rows(data, format, columns);
  const int64_t bytes = step::file_row_bytes(format, columns);
  const int64_t code_bytes = columns * info.bits / 8, num_groups = columns / info.group_columns;
  Bytes codes({num_rows, code_bytes});
  const int64_t scale_bytes = num_groups * (info.is_float4 ? 1 : sizeof(float));
  const py::object scales = info.is_float4 ? py::object(Bytes({num_rows, num_groups}))
                                           : py::object(Array<float>({num_rows, num_groups}));
  Array<float> offsets({info.has_offsets ? num_rows : 0, num_groups});
  const uint8_t* const from = data.data();
  uint8_t* const to_codes = codes.mutable_data();
  auto* const to_scales = static_cast<uint8_t*>(py::array(scales).mutable_data());
  float* const to_offsets = info.has_offsets ? offsets.mutable_data() : nullptr;
  {
    const py::gil_scoped_release release;
    cpu::parallel_range(num_rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        step::repack_row(format, from + row * bytes, columns, to_codes + row * code_bytes,
                         to_scales + row * scale_bytes,
                         to_offsets == nullptr ? nullptr : to_offsets + row * num_groups);
      }
    });
  }
  return py::make_tuple(codes, scales, info.has_offsets ? py::object(offsets) : py::none());
}

py::list formats() {
  py::list rows;
  for (int i = 0; i < step::kNumFormats; ++i) {
    rows.append(py::cast(step::format_info(static_cast<step::Format>(i))));
  }
  return rows;
}

}  // namespace

void bind_formats(py::module_& module) {
  using step::FormatInfo;
  py::class_<FormatInfo>(module, "WeightFormat", "A row of csrc/formats.def.")
      .def_readonly("name", &FormatInfo::name)
      .def_property_readonly("ggml_type",
                             [](const FormatInfo& info) {
                               return info.ggml_type < 0 ? py::object(py::none())
                                                         : py::object(py::int_(info.ggml_type));
                             })
      .def_readonly("block_columns", &FormatInfo::block_columns)
      .def_readonly("block_bytes", &FormatInfo::block_bytes)
      .def_readonly("is_quantised", &FormatInfo::is_quantised)
      .def_readonly("has_kernel", &FormatInfo::has_kernel)
      .def_property_readonly(
          "panel_bytes",
          [](const FormatInfo& info) {
            const step::PanelInfo& panel = info.panel;
            const auto headers = static_cast<double>(panel.header_bytes());
            return (static_cast<double>(panel.block_bytes()) +
                    headers / std::max(panel.header_blocks, 1)) /
                   (step::kPanelRows * step::kBlockColumns);
          },
          "Bytes per weight as the CPU's kernels hold it.")
      .def_property_readonly("repacked_bits",
                             [](const FormatInfo& info) { return info.repacked.bits; })
      .def_property_readonly("repacked_zero",
                             [](const FormatInfo& info) { return info.repacked.zero; })
      .def_property_readonly("has_half_scales",
                             [](const FormatInfo& info) { return info.repacked.has_half_scales; })
      .def_property_readonly("is_float8",
                             [](const FormatInfo& info) { return info.repacked.is_float8; })
      .def_property_readonly("is_float4",
                             [](const FormatInfo& info) { return info.repacked.is_float4; });
  module.def("formats", &formats, "Return the table of weight formats.");
  module.def("decode_rows", &decode_rows, py::arg("data").noconvert(), py::arg("format"),
             py::arg("columns"),
             "Return a file's rows as float32 [rows, columns], equal to ggml's to the bit.");
  module.def("decode_bfloat16", &decode_bfloat16, py::arg("data").noconvert(), py::arg("format"),
             py::arg("columns"),
             "Return the bits of a file's rows rounded to bfloat16, uint16 [rows, columns].");
  module.def(
      "decode_halves", &decode_halves, py::arg("data").noconvert(), py::arg("format"),
      py::arg("columns"), py::arg("places").noconvert(),
      "Return the bits of a file's rows rounded to float16, uint16 [rows, columns], column i "
      "at places[i]; None if one is not finite. `places` must be a permutation.");
  module.def("quantise", &quantise, py::arg("data").noconvert(), py::arg("format"),
             py::arg("columns"), py::arg("to"),
             "Quantise a file's rows to Q8_0 or Q4_0; return the bytes of their blocks.");
  module.def("bfloat16_bits", &bfloat16_bits, py::arg("values").noconvert(),
             "Round float32 values to bfloat16; return the bits, uint16 of the same shape.");
  module.def("repack_rows", &repack_rows, py::arg("data").noconvert(), py::arg("format"),
             py::arg("columns"),
             "Return codes, scales and offsets (or None) of a file's rows, each [rows, ...].");
}

}  // namespace tgi
