// Adapters as Python holds them: what is added to the products of a model, checked once.
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
    int64_t max_inner;  // inner values that an adapter may have here
  };
  std::vector<Product> products;

  // Throws where there is no such product.
  const Product& at(int64_t product) const;
};

using LayoutPtr = std::shared_ptr<const AdapterLayout>;

// The weights of one adapter, in one piece of memory in the order in which a step reads them.
// Steps in flight share it, so that whoever has loaded it may let go of it at any time.
class Adapter {
 public:
  // What is added to a product. `panels` says of each panel its first inner value and how many it
  // has; `up` has as many rows a panel, those of the first panel first.
  struct Part {
    int64_t product;
    Array<uint16_t> down;   // [num_inner, columns], bf16
    Array<float> scales;    // [num_inner]
    Array<int64_t> panels;  // [num_panels, 2]
    Array<uint16_t> up;     // [any, 16], bf16
  };

  Adapter(LayoutPtr layout, const std::vector<Part>& parts);

  const LayoutPtr& layout() const { return layout_; }
  const step::AdapterTerm* terms() const { return terms_.data(); }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  void add(const Part& part, uint8_t* memory);

  const LayoutPtr layout_;
  cpu::Memory memory_;
  int64_t num_bytes_ = 0;
  std::vector<step::AdapterTerm> terms_;  // one a product
  std::vector<std::vector<step::AdapterPanel>> panels_;
};

using AdapterPtr = std::shared_ptr<const Adapter>;

void bind_adapters(py::module_& module);

}  // namespace tgi
