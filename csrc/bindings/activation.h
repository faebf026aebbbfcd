// Maps activation names to enum values, for the bindings of both devices.
#pragma once

#include <optional>
#include <string>

#include "params.h"

namespace tgi {

constexpr const char* kGatedNames = "silu, gelu_tanh, gelu, relu or relu_squared";
constexpr const char* kActivationNames = "silu, gelu_tanh, gelu, relu, relu_squared or xielu";

inline std::optional<MlpActivation> find_activation(const std::string& name) {
  if (name == "silu") return MlpActivation::kSilu;
  if (name == "gelu_tanh") return MlpActivation::kGeluTanh;
  if (name == "gelu") return MlpActivation::kGelu;
  if (name == "relu") return MlpActivation::kRelu;
  if (name == "relu_squared") return MlpActivation::kReluSquared;
  if (name == "xielu") return MlpActivation::kXielu;
  return std::nullopt;
}

}  // namespace tgi
