// The pybind11 module tgi_asgi._C: the thread team, kernel sets, weights, the cache, sampling and
// recorded steps. Independent of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/adapter.h"
#include "bindings/attention_spec.h"
#include "bindings/device_queue.h"
#include "bindings/device_rows.h"
#include "bindings/direct.h"
#include "bindings/drafting.h"
#include "bindings/experts.h"
#include "bindings/kv_pool.h"
#include "bindings/matrix.h"
#include "bindings/paged_attention.h"
#include "bindings/program.h"
#include "bindings/rows.h"
#include "bindings/sample.h"
#include "bindings/shards.h"
#include "bindings/state_pool.h"
#include "bindings/state_rows.h"
#include "bindings/step_queue.h"
#include "bindings/tensor_memory.h"
#include "cpu/platform.h"
#include "cpu/progress.h"
#include "cpu/step/kernel_sets.h"
#include "cpu/team.h"

namespace tgi {

namespace {

std::vector<std::string> kernel_set_names() {
  std::vector<std::string> names;
  for (const step::Kernels* set : step::kernel_sets()) names.emplace_back(set->name);
  return names;
}

void use_kernel_set(const std::string& name) {
  for (const step::Kernels* set : step::kernel_sets()) {
    if (name == set->name) return step::use_kernels(*set);
  }
  throw std::invalid_argument("`name` must be one of kernel_sets(), got " + name);
}

// Fails if no kernel set runs here, or if TGI_ISA, which is set in order to compare sets, names one
// that does not.
void check_kernel_sets() {
  // Done at import: the system grants AMX's tiles only to a process whose threads have no small
  // signal stacks.
  const std::vector<std::string> names = kernel_set_names();
  if (names.empty()) throw py::import_error(step::refused_kernel_set());
  const char* wanted = std::getenv("TGI_ISA");
  if (wanted == nullptr || *wanted == '\0' || std::string(wanted) == step::kernels().name) return;
  std::string known;
  for (const std::string& name : names) known += (known.empty() ? "" : ", ") + name;
  const char* const refused = step::refused_kernel_set();
  throw py::import_error("TGI_ISA must be one of " + known + " on this machine, got " + wanted +
                         (refused == nullptr ? "" : std::string("; ") + refused));
}

void check_threads(int num_threads) {
  check(num_threads >= 0 && num_threads <= 1024,
        "`num_threads` must be in [0, 1024] (0: the default), got ", num_threads);
}

void check_spin(int spin_us) {
  check(spin_us >= 0 && spin_us <= 1000000, "`spin_us` must be in [0, 1000000], got ", spin_us);
}

void configure_team(int num_threads, int nice, bool pin, int spin_us, bool yields_cores) {
  check_threads(num_threads);
  check(nice >= -20 && nice <= 19, "`nice` must be in [-20, 19], got ", nice);
  check_spin(spin_us);
  cpu::configure_team({num_threads, nice, pin, spin_us, yields_cores});
}

// Measures the whole team's operations per second with the instruction that products of this
// precision use; a multiply-add counts as two. Benchmarks compare products with this upper bound.
double arithmetic_peak(const std::string& precision_name) {
  constexpr int64_t kTimes = 20000;
  constexpr auto kLength = std::chrono::milliseconds(100);
  const step::Precision precision = precision_of(precision_name);
  double speed = 0;
  cpu::run_on_team([&](int member, int num_members) {
    const auto start = std::chrono::steady_clock::now();
    std::chrono::duration<double> taken{};
    double operations = 0;
    while (taken < kLength) {
      operations += step::kernels().spin(precision, kTimes);
      taken = std::chrono::steady_clock::now() - start;
    }
    if (member == 0) speed = operations / taken.count() * num_members;
  });
  return speed;
}

void bind_team(py::module_& module) {
  using release = py::call_guard<py::gil_scoped_release>;
  module.def("num_threads", &cpu::num_threads, release(),
             "Return the number of compute threads, including the caller's.");
  module.def(
      "set_num_threads",
      [](int num_threads) {
        check_threads(num_threads);
        cpu::set_num_threads(num_threads);
      },
      py::arg("num_threads"), release(),
      "Set the number of compute threads; 0 means the default (for tests and benchmarks).");
  module.def(
      "num_cores", [] { return cpu::usable_cores().size(); }, release(),
      "Return the number of cores that the process may use by affinity, not counting SMT.");
  module.def(
      "default_num_threads", &cpu::default_num_threads, release(),
      "Return the number of cores that the process may use by affinity (not counting SMT) and "
      "cgroup quota.");
  module.def(
      "usable_cores", [] { return cpu::usable_cores(); },
      "Return the ids of the cores that the process may use by affinity, not counting SMT.");
  module.def("configure_team", &configure_team, py::arg("num_threads") = 0, py::arg("nice") = 0,
             py::arg("pin") = false, py::arg("spin_us") = 75, py::arg("yields_cores") = false,
             release(),
             "Restart the team with these options; `yields_cores`: while other programs use the "
             "cores, runs leave threads out.");
  module.def("num_running_threads", &cpu::num_running_threads,
             "Return how many threads the last run had.");
  module.def("team_progress", &cpu::team_progress,
             "Return a number that changes many times in a step, unless it hangs.");
  module.def(
      "join_team", &cpu::join_team, release(),
      "Make the calling thread member 0, with the team's nice value and that member's core.");
  module.def(
      "team_spin",
      [](int spin_us) {
        check_spin(spin_us);
        cpu::team_spin(spin_us);
      },
      py::arg("spin_us"),
      "Have idle members spin for this long from now on. Set 0 for the configured time.");
  module.def(
      "team_yield_after",
      [](int microseconds) {
        check_spin(microseconds);
        cpu::team_yield_after(microseconds);
      },
      py::arg("spin_us"),
      "Have members spin for this long at a barrier before they yield their cores; 1000 by "
      "default (for tests and benchmarks).");
  module.def("wake_team", &cpu::team_wake, release(), "Unpark the team ahead of a step.");
  module.def(
      "arithmetic_peak", &arithmetic_peak, py::arg("precision"), release(),
      "Measure the team's operations per second in inner products; a multiply-add counts as two "
      "(for tests and benchmarks).");
}

}  // namespace

}  // namespace tgi

PYBIND11_MODULE(_C, module) {
  tgi::check_kernel_sets();
  tgi::cpu::raise_stack_size();
  module.doc() = "The engine's own arithmetic on CPUs; call it through tgi_asgi.ops.";
  module.def(
      "kernel_set", [] { return std::string(tgi::step::kernels().name); },
      "Return the name of the kernel set in use, which is that of an instruction set.");
  module.def(
      "kernel_arithmetic", [] { return std::string(tgi::step::kernels().arithmetic); },
      "Return how the kernel set in use rounds bfloat16 products.");
  module.def("kernel_sets", &tgi::kernel_set_names,
             "Return the names of the kernel sets that this machine can run, best last (for tests "
             "and benchmarks).");
  module.def(
      "refused_kernel_set",
      []() -> std::optional<std::string> {
        const char* const refused = tgi::step::refused_kernel_set();
        return refused == nullptr ? std::nullopt : std::optional<std::string>(refused);
      },
      "Return why a kernel set that the processor supports is not used, or None.");
  module.def("use_kernel_set", &tgi::use_kernel_set, pybind11::arg("name"),
             "Use this kernel set from now on (for tests and benchmarks).");
  tgi::bind_team(module);
  tgi::bind_formats(module);
  tgi::bind_integer_codes(module);
  tgi::bind_matrices(module);
  tgi::bind_kv_pool(module);
  tgi::bind_state_pool(module);
  tgi::bind_sampling(module);
  tgi::bind_adapters(module);
  tgi::bind_image_rows(module);
  tgi::bind_rows(module);
  tgi::bind_device_rows(module);
  tgi::bind_shards(module);
  tgi::bind_attention_spec(module);
  tgi::bind_experts(module);
  tgi::bind_program(module);
  tgi::bind_state_rows(module);
  tgi::bind_paged_attention(module);
  tgi::bind_direct(module);
  tgi::bind_tensor_memory(module);
  tgi::bind_drafting(module);
  tgi::bind_step_queue(module);
  tgi::bind_device_queue(module);
}
