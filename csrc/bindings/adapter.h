// LoRA adapters as Python holds them: the terms added to a model's products, checked once.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "bindings/checks.h"
#include "cpu/memory.h"
#include "cpu/step/adapter.h"

namespace tgi {

namespace step = cpu::step;

// The products of a model that adapters may change.
struct AdapterLayout {
  struct Product {
    int64_t num_columns;  // of the packed weight
    int64_t num_panels;
    int64_t max_inner;  // maximum number of inner values (rank) of an adapter here
  };
  std::vector<Product> products;

  // Throws if there is no such product.
  const Product& at(int64_t product) const;
};

using LayoutPtr = std::shared_ptr<const AdapterLayout>;

// The weights of one adapter, in one block of memory in the order in which a step reads them. Steps
// in flight share it, so the owner may release it at any time.
class Adapter {
 public:
  // The term added to one product. `panels` holds each panel's first inner value and its number of
  // inner values; `up` has that many rows per panel, in panel order.
  struct Part {
    int64_t product;
    Array<uint16_t> down;   // [num_inner, columns], bf16
    Array<float> scales;    // [num_inner]
    Array<int64_t> panels;  // [num_panels, 2]
    Array<uint16_t> up;     // [any, 16], bf16
  };

  // A copy of bytes that is still to be made.
  struct Copy {
    uint8_t* to;
    const void* from;
    size_t bytes;
  };

  // number: what a step calls it when it is sent to other shards. Needs the GIL, and releases it
  // while it copies.
  Adapter(LayoutPtr layout, const std::vector<Part>& parts, int64_t number);

  const LayoutPtr& layout() const { return layout_; }
  const step::AdapterTerm* terms() const { return terms_.data(); }
  int64_t number() const { return number_; }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  // Checks a part and gives it the next place in `memory`.
  void add(const Part& part, uint8_t*& memory, std::vector<Copy>& copies);

  const LayoutPtr layout_;
  const int64_t number_;
  cpu::Memory memory_;
  int64_t num_bytes_ = 0;
  std::vector<step::AdapterTerm> terms_;  // one per product
  std::vector<std::vector<step::AdapterPanel>> panels_;
};

using AdapterPtr = std::shared_ptr<const Adapter>;

void bind_adapters(py::module_& module);

}  // namespace tgi
