// The activation functions of MLPs, over the simd type S. Included only by the step_<isa>.cpp
// files.
#pragma once

#include "simd_math.h"

namespace tgi::cpu::step {
namespace {

// x / (1 + e^-x).
template <class S>
inline typename S::F silu(typename S::F x) {
  const auto e = exp2<S, false>(S::mul(x, S::set1(-kFloatLog2E)));
  return S::div(x, S::add(S::set1(1.0f), e));
}

// 1 / (1 + e^-x).
template <class S>
inline typename S::F sigmoid(typename S::F x) {
  const auto one = S::set1(1.0f);
  return S::div(one, S::add(one, exp2<S, false>(S::mul(x, S::set1(-kFloatLog2E)))));
}

// GELU's tanh approximation, which is x * sigmoid(2 * 0.79788 * (x + 0.044715 x^3)).
template <class S>
inline typename S::F gelu_tanh(typename S::F x) {
  const auto cubic = S::fma(S::mul(S::mul(x, x), S::set1(0.044715f)), x, x);
  const auto e = exp2<S, false>(S::mul(cubic, S::set1(-kFloatLog2E * 1.5957691216057308f)));
  return S::div(x, S::add(S::set1(1.0f), e));
}

// GELU: x * (1 + erf(x / sqrt(2))) / 2, computed as max(x, 0) - |x| * erfc(|x| / sqrt(2)) / 2,
// which avoids subtracting close numbers. erfc(z) = e^-z^2 * P(1 / (1 + 0.4 z)), relative error
// 4e-7.
template <class S>
inline typename S::F gelu(typename S::F x) {
  const auto size = S::as_float(S::abs_bits(x));
  const auto z = S::mul(size, S::set1(0.70710678118654752f));
  const auto t = S::div(S::set1(1.0f), S::fma(z, S::set1(0.4f), S::set1(1.0f)));
  auto p = S::set1(2.694276568e-02f);
  p = S::fma(p, t, S::set1(-6.536386037e-02f));
  p = S::fma(p, t, S::set1(-8.542302012e-02f));
  p = S::fma(p, t, S::set1(3.043162704e-01f));
  p = S::fma(p, t, S::set1(-9.190109757e-02f));
  p = S::fma(p, t, S::set1(2.809490791e-01f));
  p = S::fma(p, t, S::set1(1.732338435e-01f));
  p = S::fma(p, t, S::set1(2.322360440e-01f));
  p = S::fma(p, t, S::set1(2.249783168e-01f));
  p = S::fma(p, t, S::set1(3.168569670e-05f));
  const auto e = exp2<S, false>(S::mul(S::mul(z, z), S::set1(-kFloatLog2E)));
  const auto tail = S::mul(S::mul(size, S::set1(0.5f)), S::mul(p, e));
  return S::sub(S::max(S::zero(), x), tail);
}

template <class S>
inline typename S::F relu(typename S::F x) {
  return S::max(S::zero(), x);  // this order keeps NaN
}

// e^x - 1 - x for x <= 0, by a series near zero, where the difference would lose its digits.
template <class S>
inline typename S::F expm1_minus_x(typename S::F x) {
  auto p = S::set1(1.0f / 40320);
  p = S::fma(p, x, S::set1(1.0f / 5040));
  p = S::fma(p, x, S::set1(1.0f / 720));
  p = S::fma(p, x, S::set1(1.0f / 120));
  p = S::fma(p, x, S::set1(1.0f / 24));
  p = S::fma(p, x, S::set1(1.0f / 6));
  p = S::fma(p, x, S::set1(0.5f));
  const auto near = S::mul(S::mul(x, x), p);
  const auto e = exp2<S, false>(S::mul(x, S::set1(kFloatLog2E)));
  const auto far = S::sub(S::sub(e, S::set1(1.0f)), x);
  return S::add_less_equal(far, S::set1(-0.5f), x, S::sub(near, far));
}

// xIELU: positive * x^2 + x / 2 above zero, negative * (e^x - 1 - x) + x / 2 below (Huang and
// Schlag, Deriving Activation Functions Using Integration, arXiv 2411.13010).
template <class S>
inline typename S::F xielu(typename S::F x, const MlpFunction& f) {
  const auto above = S::max(S::zero(), x), below = S::min(S::zero(), x);
  const auto line = S::mul(x, S::set1(0.5f));
  const auto sum = S::fma(S::mul(above, above), S::set1(f.positive), line);
  return S::fma(expm1_minus_x<S>(below), S::set1(f.negative), sum);
}

// A clamped gate and up. Source: OpenAI, gpt-oss model card, arXiv 2508.10925.
template <class S>
inline typename S::F clamped_gate(const ClampedGate& p, typename S::F gate, typename S::F up) {
  gate = S::min(S::set1(p.limit), gate);  // this order keeps NaN
  up = S::max(S::set1(-p.limit), S::min(S::set1(p.limit), up));
  const auto e = exp2<S, false>(S::mul(gate, S::set1(-kFloatLog2E * p.slope)));
  const auto value = S::div(gate, S::add(S::set1(1.0f), e));
  return S::mul(value, S::add(up, S::set1(p.offset)));
}

template <class S>
inline typename S::F activate(const MlpFunction& function, typename S::F x) {
  switch (function.kind) {
    case MlpActivation::kSilu:
      return silu<S>(x);
    case MlpActivation::kGeluTanh:
      return gelu_tanh<S>(x);
    case MlpActivation::kGelu:
      return gelu<S>(x);
    case MlpActivation::kRelu:
      return relu<S>(x);
    case MlpActivation::kReluSquared:
      return S::mul(relu<S>(x), relu<S>(x));
    case MlpActivation::kXielu:
      return xielu<S>(x, function);
  }
  return x;
}

}  // namespace
}  // namespace tgi::cpu::step
