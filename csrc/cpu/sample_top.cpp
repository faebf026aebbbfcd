#include "sample_top.h"

#include <utility>

namespace tgi::cpu {

namespace {

// A binary heap in two arrays: the worst entry is first, and no entry is worse than its parent (i -
// 1) / 2.
struct Heap {
  float* values;
  int32_t* ids;
  int64_t size;

  bool is_worse(int64_t a, int64_t b) const {
    return values[a] != values[b] ? values[a] < values[b] : ids[a] > ids[b];
  }

  // Restores a heap whose entry i may be better than its children.
  void sink(int64_t i) {
    for (int64_t child = 2 * i + 1; child < size; child = 2 * i + 1) {
      if (child + 1 < size && is_worse(child + 1, child)) ++child;
      if (!is_worse(child, i)) return;
      swap(i, child);
      i = child;
    }
  }

  void build() {
    for (int64_t i = size / 2 - 1; i >= 0; --i) sink(i);
  }

  // Sorts the entries best first. They no longer form a heap.
  void sort() {
    while (size > 1) {
      --size;
      swap(0, size);
      sink(0);
    }
  }

  void swap(int64_t a, int64_t b) {
    std::swap(values[a], values[b]);
    std::swap(ids[a], ids[b]);
  }
};

}  // namespace

int64_t list_top(const RowPasses& rows, const float* values, int64_t n, float floor, int64_t wanted,
                 float* best, int32_t* ids) {
  Heap heap = {best, ids, 0};
  int64_t i = 0;
  for (; heap.size < wanted; ++i) {
    i = rows.find(values, i, n, floor, true);
    if (i == n) break;
    best[heap.size] = values[i];
    ids[heap.size++] = static_cast<int32_t>(i);
  }
  heap.build();
  for (; wanted > 0 && i < n; ++i) {
    i = rows.find(values, i, n, best[0], false);
    if (i == n) break;
    best[0] = values[i];
    ids[0] = static_cast<int32_t>(i);
    heap.sink(0);
  }
  const int64_t filled = heap.size;
  heap.sort();
  return filled;
}

}  // namespace tgi::cpu
