#include "bindings/kv_pool.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <tuple>
#include <unordered_set>

#include "bindings/matrix.h"

namespace tgi {

namespace {

constexpr int64_t kMaxBytes = int64_t{1} << 55;  // per block; a single layer's part is below 2^50

void check_heads(const KvShape& shape, step::Precision precision) {
  const int64_t unit = precision == step::Precision::kInt8 ? step::kStripRows : 2;
  const auto check_dim = [unit](int64_t dim, const char* name) {
    check(dim >= unit && dim <= step::kMaxHeadDim && dim % unit == 0, "`", name,
          "` must be a multiple of ", unit, " up to ", step::kMaxHeadDim, ", got ", dim);
  };
  check_size(shape.num_kv_heads, "num_kv_heads");
  check_dim(shape.head_dim, "head_dim");
  check_dim(shape.value_dim, "value_dim");
}

void check_latent(const KvShape& shape, step::Precision precision) {
  check(precision != step::Precision::kInt8, "latents are kept as floats, not as int8");
  check(shape.num_kv_heads == 1, "latents are of one head, got ", shape.num_kv_heads);
  const auto check_dim = [](int64_t dim, int64_t most, const char* name) {
    check(dim > 0 && dim <= most && dim % step::kStripRows == 0, "`", name,
          "` of latents must be a multiple of ", step::kStripRows, " up to ", most, ", got ", dim);
  };
  check_dim(shape.head_dim, step::kMaxLatentDim, "head_dim");
  check_dim(shape.value_dim, std::min(step::kMaxHeadDim, shape.head_dim), "value_dim");
}

}  // namespace

KvPool::KvPool(const std::vector<KvShape>& layers, int64_t num_blocks, int64_t block_size,
               const std::string& precision, bool has_latents)
    : num_blocks_(num_blocks), block_size_(block_size), precision_(precision_of(precision)) {
  const auto count = static_cast<int64_t>(layers.size());
  check(count > 0 && count <= kMaxLayers, "`layers` must be 1 to ", kMaxLayers, ", got ", count);
  check(num_blocks > 0 && num_blocks < INT32_MAX / std::max<int64_t>(block_size, 1),
        "`num_blocks` must be positive, and all slots below 2^31, got ", num_blocks);
  check(block_size == 16 || block_size == 32 || block_size == 64,
        "`block_size` must be 16, 32 or 64, got ", block_size);
  std::vector<int64_t> offsets, sizes;  // of layers within their group's block; of groups' blocks
  for (const KvShape& shape : layers) {
    if (has_latents) {
      check_latent(shape, precision_);
    } else {
      check_heads(shape, precision_);
    }
    check(shape.group >= 0 && shape.group < kMaxLayers, "`group` must be in [0, ", kMaxLayers,
          "), got ", shape.group);
    step::KvLayerView view = {};
    view.precision = precision_;
    view.group = shape.group;
    view.num_blocks = num_blocks;
    view.block_size = block_size;
    view.num_heads = shape.num_kv_heads;
    view.head_dim = shape.head_dim;
    view.value_dim = shape.value_dim;
    view.is_latent = has_latents;
    num_groups_ = std::max(num_groups_, shape.group + 1);
    sizes.resize(static_cast<size_t>(num_groups_));
    int64_t& size = sizes[static_cast<size_t>(shape.group)];
    offsets.push_back(size);
    if (size > kMaxBytes) throw std::bad_alloc();
    size += view.layer_bytes();
    layers_.push_back(view);
  }
  block_bytes_ = *std::max_element(sizes.begin(), sizes.end());
  memory_ = cpu::allocate(cpu::product_of_sizes({num_blocks, block_bytes_}) + step::kPoolSlack);
  for (size_t i = 0; i < layers_.size(); ++i) {
    layers_[i].data = memory_.get() + offsets[i];
    layers_[i].block_stride = block_bytes_;
  }
}

step::KvLayerView KvPool::layer(int64_t index) const {
  check(index >= 0 && index < num_layers(), "`layer` must be in [0, ", num_layers(), "), got ",
        index);
  return layers_[static_cast<size_t>(index)];
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

namespace {

// layers: per layer the number of KV heads, the dims of keys and of values, and the group.
std::shared_ptr<KvPool> make_pool(
    const std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>>& layers, int64_t num_blocks,
    int64_t block_size, const std::string& precision, bool has_latents) {
  std::vector<KvShape> shapes;
  for (const auto& [heads, head_dim, value_dim, group] : layers) {
    shapes.push_back({heads, head_dim, value_dim, group});
  }
  return std::make_shared<KvPool>(shapes, num_blocks, block_size, precision, has_latents);
}

}  // namespace

void bind_kv_pool(py::module_& module) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<KvPool, std::shared_ptr<KvPool>>(module, "KvPool", "See tgi_asgi.ops.KvPool.")
      .def(py::init(&make_pool), py::kw_only(), py::arg("layers"), py::arg("num_blocks"),
           py::arg("block_size"), py::arg("precision"), py::arg("has_latents") = false)
      .def_property_readonly(
          "block_bytes", &KvPool::block_bytes,
          "Bytes of one block, in all layers of a group (for tests and benchmarks).")
      .def("copy", &KvPool::copy, py::arg("pairs"), release())
      .def("supply", &KvPool::supply, py::arg("num_bytes"))
      .def("wait_for_supply", &KvPool::wait_for_supply, release(),
           "Wait until all of the supply is committed (for tests and benchmarks).")
      .def("close_supply", &KvPool::close_supply, release())
      .def(
          "memory",
          [](const py::object& self) {
            const auto& pool = self.cast<const KvPool&>();
            return py::array_t<uint8_t>({pool.num_blocks(), pool.block_bytes()}, pool.data(), self);
          },
          "Return the bytes of all blocks, without copying (for tests and benchmarks).");
}

}  // namespace tgi
