// Bindings of cpu/integer_codes.h in tgi_asgi._C.
#include "cpu/integer_codes.h"

#include <algorithm>

#include "bindings/matrix.h"
#include "cpu/team.h"

namespace tgi {

namespace {

using Codes = Array<uint8_t>;
using Words = Array<int32_t>;
using Places = Array<int64_t>;

const uint8_t* bytes_of(const Words& words) {
  return static_cast<const uint8_t*>(static_cast<const void*>(words.data()));
}

Words transposed_words(const Words& words) {
  check_shape(words, "words", {-1, -1});
  const int64_t height = words.shape(0), width = words.shape(1);
  Words out({width, height});
  auto* const to = static_cast<uint8_t*>(static_cast<void*>(out.mutable_data()));
  const uint8_t* const from = bytes_of(words);
  const py::gil_scoped_release release;
  cpu::parallel_range(width, 16, [&](int64_t begin, int64_t end) {
    cpu::transpose_words(from, height, width, begin, end, to);
  });
  return out;
}

Codes awq_codes(const Words& words) {
  check_shape(words, "words", {-1, -1});
  const int64_t columns = words.shape(0), width = words.shape(1);
  check(columns % 2 == 0, "`words` must have an even number of rows, got ", columns);
  Codes out({8 * width, columns / 2});
  uint8_t* const to = out.mutable_data();
  const uint8_t* const from = bytes_of(words);
  const py::gil_scoped_release release;
  cpu::parallel_range(width, 16, [&](int64_t begin, int64_t end) {
    cpu::unpack_awq(from, columns, width, begin, end, to);
  });
  return out;
}

Codes unpacked_stream(const Words& words, int bits) {
  check(bits >= 1 && bits <= 8, "`bits` must be in [1, 8], got ", bits);
  check_shape(words, "words", {-1, -1});
  const int64_t rows = words.shape(0), size = 4 * words.shape(1), columns = size * 8 / bits;
  Codes out({rows, columns});
  uint8_t* const to = out.mutable_data();
  const uint8_t* const from = bytes_of(words);
  const py::gil_scoped_release release;
  cpu::parallel_range(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      cpu::unpack_stream(from + row * size, size, bits, to + row * columns);
  });
  return out;
}

Codes reordered_nibbles(const Codes& codes, const Places& order) {
  check_shape(codes, "codes", {-1, -1});
  const int64_t rows = codes.shape(0), bytes = codes.shape(1), columns = 2 * bytes;
  check_shape(order, "order", {columns});
  check_range(order.data(), columns, columns, "order");
  Codes out({rows, bytes});
  uint8_t* const to = out.mutable_data();
  const uint8_t* const from = codes.data();
  const int64_t* const places = order.data();
  const py::gil_scoped_release release;
  cpu::parallel_range(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      cpu::reorder_nibbles(from + row * bytes, places, columns, to + row * bytes);
  });
  return out;
}

Array<float> dequantise(const Codes& codes, int bits, const Array<float>& scales,
                        const Codes& zeros, const Places& groups) {
  check(bits == 4 || bits == 8, "`bits` must be 4 or 8, got ", bits);
  check_shape(codes, "codes", {-1, -1});
  const int64_t rows = codes.shape(0), bytes = codes.shape(1), columns = bytes * 8 / bits;
  check_shape(scales, "scales", {rows, -1});
  const int64_t num_groups = scales.shape(1);
  check_shape(zeros, "zeros", {rows, num_groups});
  check_shape(groups, "groups", {columns});
  check_range(groups.data(), columns, num_groups, "groups");
  Array<float> out({rows, columns});
  float* const to = out.mutable_data();
  const uint8_t *const from = codes.data(), *const points = zeros.data();
  const float* const factors = scales.data();
  const int64_t* const places = groups.data();
  const py::gil_scoped_release release;
  cpu::parallel_range(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      cpu::dequantise_row(from + row * bytes, bits, factors + row * num_groups,
                          points + row * num_groups, places, columns, to + row * columns);
    }
  });
  return out;
}

Array<float> decode_nibbles(const Codes& nibbles, int64_t count, bool is_high_first,
                            const Array<float>& table, const Array<float>& scales, int64_t run) {
  check_shape(nibbles, "nibbles", {-1});
  check_shape(table, "table", {16});
  check_shape(scales, "scales", {-1});
  check(count >= 0 && count <= 2 * nibbles.size(), "`count` must be in [0, ", 2 * nibbles.size(),
        "], got ", count);
  check(run > 0 && (count == 0 || (count - 1) / run < scales.size()),
        "`scales` must have one number for each run of ", run, ", got ", scales.size());
  Array<float> out({count});
  float* const to = out.mutable_data();
  const uint8_t* const from = nibbles.data();
  const float *const values = table.data(), *const factors = scales.data();
  const int64_t piece = int64_t{1} << 14;
  const py::gil_scoped_release release;
  cpu::parallel_range((count + piece - 1) / piece, 1, [&](int64_t begin, int64_t end) {
    cpu::decode_nibbles(from, is_high_first, values, factors, run, begin * piece,
                        std::min(end * piece, count), to);
  });
  return out;
}

}  // namespace

void bind_integer_codes(py::module_& module) {
  module.def("transposed_words", &transposed_words, py::arg("words").noconvert(),
             "Return the transpose of int32 words.");
  module.def(
      "awq_codes", &awq_codes, py::arg("words").noconvert(),
      "Undo AutoAWQ's packing of words [columns, rows / 8]: nibbles [rows, columns / 2], the "
      "first of two columns in the low half.");
  module.def(
      "unpacked_stream", &unpacked_stream, py::arg("words").noconvert(), py::arg("bits"),
      "Unpack a stream of codes in each row of words, lowest bits first: [rows, words * 32 / "
      "bits].");
  module.def("reordered_nibbles", &reordered_nibbles, py::arg("codes").noconvert(),
             py::arg("order").noconvert(),
             "Return the nibbles [rows, columns / 2] in this order of columns.");
  module.def("dequantise", &dequantise, py::arg("codes").noconvert(), py::arg("bits"),
             py::arg("scales").noconvert(), py::arg("zeros").noconvert(),
             py::arg("groups").noconvert(),
             "Return scales[:, groups] * (codes - zeros[:, groups]) as float32.");
  module.def("decode_nibbles", &decode_nibbles, py::arg("nibbles").noconvert(), py::arg("count"),
             py::arg("is_high_first"), py::arg("table").noconvert(), py::arg("scales").noconvert(),
             py::arg("run"),
             "Return table[nibble] * scales[index // run] of a stream of nibbles as float32.");
}

}  // namespace tgi
