#include "bindings/shards.h"

#include <pybind11/stl.h>

#include <cstring>

#include "bindings/checks.h"

namespace tgi {

namespace {

constexpr int64_t kWord = 8;      // everything is aligned to it
constexpr int64_t kNumbers = 16;  // reserved for single numbers and array sizes
constexpr int64_t kMaxCopies = 4096;

int64_t whole_words(int64_t bytes) { return (bytes + kWord - 1) / kWord * kWord; }

class Writer {
 public:
  explicit Writer(const cpu::ShardGroup& group)
      : to_(group.mail()), left_(group.shape().mail_bytes) {}

  void put(int64_t number) { put_bytes(&number, kWord); }
  template <class T>
  void put(const std::vector<T>& array) {
    put(static_cast<int64_t>(array.size()));
    put_bytes(array.data(), static_cast<int64_t>(array.size() * sizeof(T)));
  }

 private:
  void put_bytes(const void* data, int64_t bytes) {
    check(whole_words(bytes) <= left_, "a step must fit the shards' mailbox");
    if (bytes > 0) std::memcpy(to_, data, static_cast<size_t>(bytes));
    to_ += whole_words(bytes);
    left_ -= whole_words(bytes);
  }

  uint8_t* to_;
  int64_t left_;
};

class Reader {
 public:
  explicit Reader(const cpu::ShardGroup& group) : from_(group.mail()) {}

  int64_t get() {
    int64_t number;
    get_bytes(&number, kWord);
    return number;
  }
  template <class T>
  void get(std::vector<T>& array) {
    array.resize(static_cast<size_t>(get()));
    get_bytes(array.data(), static_cast<int64_t>(array.size() * sizeof(T)));
  }

 private:
  void get_bytes(void* data, int64_t bytes) {
    if (bytes > 0) std::memcpy(data, from_, static_cast<size_t>(bytes));
    from_ += whole_words(bytes);
  }

  const uint8_t* from_;
};

}  // namespace

namespace {

cpu::ShardShape make_shape(int64_t count, int64_t num_members, int64_t num_columns,
                           int64_t max_tokens, int64_t max_sequences, int64_t max_rows,
                           int64_t vocab_size, int64_t num_groups, int64_t table_width) {
  const std::pair<int64_t, const char*> sizes[] = {
      {count, "count"},           {num_members, "num_members"}, {num_columns, "num_columns"},
      {max_tokens, "max_tokens"}, {max_rows, "max_rows"},       {max_sequences, "max_sequences"},
      {vocab_size, "vocab_size"}, {num_groups, "num_groups"},   {table_width, "table_width"}};
  for (const auto& [size, name] : sizes) check_size(size, name);
  const int64_t words =
      kNumbers + max_tokens * (1 + num_groups) + 2 * max_sequences + max_rows + 2 * kMaxCopies;
  const int64_t tables = cpu::product_of_sizes({num_groups, max_sequences, table_width, 4});
  const int64_t lists = cpu::product_of_sizes({words, kWord});
  return {
      .count = count,
      .num_members = num_members,
      .max_tokens = max_tokens,
      .num_columns = num_columns,
      .max_rows = max_rows,
      .vocab_size = vocab_size,
      .mail_bytes = whole_words(tables) + lists,
  };
}

}  // namespace

void write_step(const FlatRows& batch, const std::vector<int32_t>& rows, bool only_rows,
                cpu::ShardGroup& group) {
  Writer to(group);
  to.put(static_cast<int64_t>(ShardMail::Kind::kStep));
  to.put(int64_t{only_rows});
  to.put(batch.num_groups);
  to.put(batch.table_width);
  to.put(batch.num_generated);
  to.put(batch.ids);
  to.put(batch.positions);
  to.put(batch.slots);
  to.put(batch.query_start);
  to.put(batch.context_len);
  to.put(batch.block_table);
  to.put(rows);
  std::vector<int64_t> adapters;
  for (const AdapterPtr& each : batch.adapters) {
    adapters.push_back(each == nullptr ? -1 : each->number());
  }
  to.put(adapters);
}

void write_mail(const ShardMail& mail, cpu::ShardGroup& group) {
  if (mail.kind == ShardMail::Kind::kStep) {
    return write_step(mail.batch, mail.rows, mail.only_rows, group);
  }
  Writer to(group);
  to.put(static_cast<int64_t>(mail.kind));
  to.put(mail.rows);
  to.put(mail.copies);
}

void read_mail(const cpu::ShardGroup& group, ShardMail& mail) {
  Reader from(group);
  mail.kind = static_cast<ShardMail::Kind>(from.get());
  if (mail.kind != ShardMail::Kind::kStep) {
    from.get(mail.rows);
    from.get(mail.copies);
    return;
  }
  mail.only_rows = from.get() != 0;
  mail.batch.num_groups = from.get();
  mail.batch.table_width = from.get();
  mail.batch.num_generated = from.get();
  from.get(mail.batch.ids);
  from.get(mail.batch.positions);
  from.get(mail.batch.slots);
  from.get(mail.batch.query_start);
  from.get(mail.batch.context_len);
  from.get(mail.batch.block_table);
  mail.batch.check_sequences();
  from.get(mail.rows);
  from.get(mail.adapters);
}

void bind_shards(py::module_& module) {
  using Group = cpu::ShardGroup;
  using cpu::ShardShape;
  py::class_<ShardShape>(module, "ShardShape", "See csrc/cpu/shard_group.h.")
      .def(py::init(&make_shape), py::kw_only(), py::arg("count"), py::arg("num_members"),
           py::arg("num_columns"), py::arg("max_tokens"), py::arg("max_sequences"),
           py::arg("max_rows"), py::arg("vocab_size"), py::arg("num_groups"),
           py::arg("table_width"))
      .def_property_readonly("num_bytes", &Group::num_bytes);
  py::class_<Group, ShardsPtr>(module, "ShardGroup", "See csrc/cpu/shard_group.h.")
      .def(py::init([](int fd, int64_t rank, const ShardShape& shape) {
             check(rank >= 0 && rank < shape.count, "`rank` must be in [0, ", shape.count,
                   "), got ", rank);
             return std::make_shared<Group>(fd, rank, shape);
           }),
           py::kw_only(), py::arg("fd"), py::arg("rank"), py::arg("shape"))
      .def_property_readonly("rank", &Group::rank)
      .def(
          "end",
          [](Group& group) {
            write_mail({ShardMail::Kind::kEnd}, group);
            group.send();
          },
          "Make the other shards end; for shard 0, after its last step.")
      .def("abort", &Group::abort)
      .def_property_readonly("is_aborted", &Group::is_aborted);
}

}  // namespace tgi
