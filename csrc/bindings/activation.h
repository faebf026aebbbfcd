// The activations by name, for the bindings of both devices.
#pragma once

#include <optional>
#include <string>

#include "params.h"

namespace tgi {

constexpr const char* kActivationNames = "silu or gelu_tanh";

inline std::optional<MlpActivation> find_activation(const std::string& name) {
  if (name == "silu") return MlpActivation::kSilu;
  if (name == "gelu_tanh") return MlpActivation::kGeluTanh;
  return std::nullopt;
}

}  // namespace tgi
