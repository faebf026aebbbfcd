// The pybind11 module tgi_asgi._C: the thread team, the instruction set, and steps. Operators are
// in the TORCH_LIBRARY of library.cpp; importing this module registers them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/module_formats.h"
#include "bindings/module_steps.h"
#include "cpu/isa.h"
#include "cpu/team.h"

namespace py = pybind11;

namespace {

using tgi::cpu::Isa;

constexpr Isa kIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512};

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa isa : kIsas) {
    if (tgi::cpu::isa_is_supported(isa)) names.emplace_back(tgi::cpu::isa_name(isa));
  }
  return names;
}

void force_isa(const std::string& name) {
  for (const Isa isa : kIsas) {
    if (name == tgi::cpu::isa_name(isa) && tgi::cpu::isa_is_supported(isa)) {
      tgi::cpu::force_isa(isa);
      return;
    }
  }
  throw std::invalid_argument("`name` must be one of supported_isas(), got " + name);
}

// A wish that cannot be met is an error: whoever sets TGI_ISA compares variants.
void check_wish() {
  const char* wanted = std::getenv("TGI_ISA");
  if (wanted == nullptr || *wanted == '\0') return;
  if (std::string(wanted) == tgi::cpu::isa_name(tgi::cpu::isa())) return;
  std::string known;
  for (const std::string& name : supported_isas()) known += (known.empty() ? "" : ", ") + name;
  throw py::import_error("TGI_ISA must be one of " + known + " on this machine, got " + wanted);
}

void check_threads(int num_threads) {
  if (num_threads < 0 || num_threads > 1024) {
    throw std::invalid_argument("`num_threads` must be in [0, 1024] (0: the default), got " +
                                std::to_string(num_threads));
  }
}

void configure_team(int num_threads, int nice, bool pin, int spin_us) {
  check_threads(num_threads);
  if (nice < -20 || nice > 19) {
    throw std::invalid_argument("`nice` must be in [-20, 19], got " + std::to_string(nice));
  }
  if (spin_us < 0 || spin_us > 1000000) {
    throw std::invalid_argument("`spin_us` must be in [0, 1000000], got " +
                                std::to_string(spin_us));
  }
  tgi::cpu::configure_team({num_threads, nice, pin, spin_us});
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using release = py::call_guard<py::gil_scoped_release>;
  check_wish();
  module.doc() =
      "Compute threads, instruction set and recorded steps of the CPU kernels; importing it "
      "registers torch.ops.tgi.";
  module.def("num_threads", &tgi::cpu::num_threads, release(),
             "Return the number of compute threads, the caller's own included.");
  module.def(
      "set_num_threads",
      [](int num_threads) {
        check_threads(num_threads);
        tgi::cpu::set_num_threads(num_threads);
      },
      py::arg("num_threads"), release(), "Set the number of compute threads; 0 means the default.");
  module.def("default_num_threads", &tgi::cpu::default_num_threads, release(),
             "Return the cores that the process may use, by affinity and by cgroup quota.");
  module.def("configure_team", &configure_team, py::arg("num_threads") = 0, py::arg("nice") = 0,
             py::arg("pin") = false, py::arg("spin_us") = 75, release(),
             "Restart the team with these options.");
  module.def("join_team", &tgi::cpu::join_team, release(),
             "Give the calling thread the team's nice value and member 0's core, for good.");
  module.def("wake_team", &tgi::cpu::team_wake, release(), "Unpark the team ahead of a step.");
  module.def(
      "isa", [] { return std::string(tgi::cpu::isa_name(tgi::cpu::isa())); },
      "Return the instruction set in use: portable, avx2 or avx512.");
  module.def("supported_isas", &supported_isas, "Return what force_isa takes on this machine.");
  module.def("force_isa", &force_isa, py::arg("name"),
             "Use this instruction set from now on (for tests).");
  tgi::bind_formats(module);
  tgi::bind_steps(module);
}
