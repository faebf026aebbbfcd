#include "bindings/kv_pool.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <unordered_set>

#include "bindings/matrix.h"

namespace tgi {

KvPool::KvPool(int64_t num_layers, int64_t num_blocks, int64_t num_kv_heads, int64_t head_dim,
               int64_t value_dim, int64_t block_size, const std::string& precision)
    : num_layers_(num_layers), view_() {
  check_positive(num_layers, "num_layers");
  check(num_blocks > 0 && num_blocks < INT32_MAX / std::max<int64_t>(block_size, 1),
        "`num_blocks` must be positive, and all slots below 2^31, got ", num_blocks);
  check_size(num_kv_heads, "num_kv_heads");
  check(block_size == 16 || block_size == 32 || block_size == 64,
        "`block_size` must be 16, 32 or 64, got ", block_size);
  view_.precision = precision_of(precision);
  const int64_t unit = view_.precision == step::Precision::kInt8 ? step::kStripRows : 2;
  const auto check_dim = [unit](int64_t dim, const char* name) {
    check(dim >= unit && dim <= step::kMaxHeadDim && dim % unit == 0, "`", name,
          "` must be a multiple of ", unit, " up to ", step::kMaxHeadDim, ", got ", dim);
  };
  check_dim(head_dim, "head_dim");
  check_dim(value_dim, "value_dim");
  view_.num_blocks = num_blocks;
  view_.block_size = block_size;
  view_.num_heads = num_kv_heads;
  view_.head_dim = head_dim;
  view_.value_dim = value_dim;
  view_.block_stride = cpu::product_of_sizes({num_layers, view_.layer_bytes()});
  memory_ =
      cpu::allocate(cpu::product_of_sizes({num_blocks, view_.block_stride}) + step::kPoolSlack);
  view_.data = memory_.get();
}

step::KvLayerView KvPool::layer(int64_t index) const {
  check(index >= 0 && index < num_layers_, "`layer` must be in [0, ", num_layers_, "), got ",
        index);
  step::KvLayerView view = view_;
  view.data += index * view.layer_bytes();
  return view;
}

void KvPool::copy(const std::vector<std::pair<int64_t, int64_t>>& pairs) {
  std::unordered_set<int64_t> targets;
  for (const auto& [from, to] : pairs) {
    check(from >= 0 && from < num_blocks() && to >= 0 && to < num_blocks(),
          "blocks must be in [0, ", num_blocks(), "), got ", from, " and ", to);
    check(targets.insert(to).second, "block ", to, " is copied to twice");
  }
  for (const auto& [from, to] : pairs) {
    check(targets.count(from) == 0, "block ", from, " is copied both from and to");
  }
  for (const auto& [from, to] : pairs) {
    std::memcpy(data() + to * block_bytes(), data() + from * block_bytes(),
                static_cast<size_t>(block_bytes()));
  }
}

void KvPool::supply(int64_t num_bytes) {
  supply_ = std::make_unique<cpu::PageSupply>(
      data(), std::min(std::max<int64_t>(num_bytes, 0), num_blocks() * block_bytes()));
}

void KvPool::wait_for_supply() {
  if (supply_ != nullptr) supply_->wait();
}

void KvPool::close_supply() {
  if (supply_ != nullptr) supply_->close();
}

void bind_kv_pool(py::module_& module) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<KvPool, std::shared_ptr<KvPool>>(module, "KvPool", "See tgi_asgi.ops.KvPool.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const std::string&>(),
           py::kw_only(), py::arg("num_layers"), py::arg("num_blocks"), py::arg("num_kv_heads"),
           py::arg("head_dim"), py::arg("value_dim"), py::arg("block_size"), py::arg("precision"))
      .def_property_readonly("num_layers", &KvPool::num_layers)
      .def_property_readonly("num_blocks", &KvPool::num_blocks)
      .def_property_readonly("block_size", &KvPool::block_size)
      .def_property_readonly("num_kv_heads", &KvPool::num_kv_heads)
      .def_property_readonly("head_dim", &KvPool::head_dim)
      .def_property_readonly("value_dim", &KvPool::value_dim)
      .def_property_readonly("block_bytes", &KvPool::block_bytes)
      .def_property_readonly("precision",
                             [](const KvPool& pool) { return precision_name(pool.precision()); })
      .def("copy", &KvPool::copy, py::arg("pairs"))
      .def("supply", &KvPool::supply, py::arg("num_bytes"))
      .def("wait_for_supply", &KvPool::wait_for_supply, release())
      .def("close_supply", &KvPool::close_supply, release())
      .def(
          "memory",
          [](const py::object& self) {
            const auto& pool = self.cast<const KvPool&>();
            return py::array_t<uint8_t>({pool.num_blocks(), pool.block_bytes()}, pool.data(), self);
          },
          "Return the bytes of all blocks, as they lie (for tests).");
}

}  // namespace tgi
