// What a step does with the sum over k of state and weight: the next state, which is the output.
// Forward, backward and linear scans differ in this alone. A new option of the step, such as a leak
// or a reset, belongs here.
#pragma once
#include "device.cuh"
#include "scan.h"

namespace rnnkern::cuda {

// The primitives of ../activation.h; NaN and infinity come out as from the reference.
template <bool approximate>
struct DeviceMath {
  static RNNKERN_DEV float one(float) { return 1.0f; }
  static RNNKERN_DEV float relu(float a) { return a <= 0.0f ? 0.0f : a; }  // NaN stays NaN
  static RNNKERN_DEV float step(float h) { return h <= 0.0f ? 0.0f : 1.0f; }
  // Near 0, where 1 - exp would cancel, a quotient of polynomials.
  static RNNKERN_DEV float tanh(float a) {
    if constexpr (approximate) return approximate_tanh(a);
    const float e = exp(-2.0f * absolute(a)), square = a * a;
    const bool near = square < 0.1225f;
    const float far_above = a < 0.0f ? e - 1.0f : 1.0f - e;
    const float above = near ? a * (105.0f + square * 10.0f) : far_above;
    return divide(above, near ? 105.0f + square * (45.0f + square) : 1.0f + e);
  }
  static RNNKERN_DEV float sigmoid(float a) {
    // 1 / (1 + exp(-a)), by a small exp alone: divide() has no large denominators.
    const float e = exp(-absolute(a));
    return divide(a < 0.0f ? e : 1.0f, 1.0f + e);
  }
  static RNNKERN_DEV float softplus(float a) {
    // max(a, 0) + log1p(e); log1p as log(u) e / (u - 1), u = 1 + e, where the rounding of u
    // cancels.
    const float e = exp(-absolute(a)), u = 1.0f + e;
    return relu(a) + (u == 1.0f ? e : log(u) * divide(e, u - 1.0f));
  }
  static RNNKERN_DEV float expm1(float a) {
    // tanh(a / 2) (1 + exp(a)), without the cancellation
    return DeviceMath<false>::tanh(0.5f * a) * (1.0f + exp(a));
  }
};

// n elements' activations, of one that is known when the kernel is compiled, or when it runs.
template <class F>
struct Known {
  RNNKERN_DEV explicit Known(Activation) {}
  template <int n>
  RNNKERN_DEV void f(float (&a)[n]) const {
    RNNKERN_UNROLL
    for (int i = 0; i < n; ++i) a[i] = F::f(a[i]);
  }
  template <int n>
  RNNKERN_DEV void times_df(float (&x)[n], const float (&h)[n]) const {
    RNNKERN_UNROLL
    for (int i = 0; i < n; ++i) x[i] *= F::df(h[i]);
  }
};
template <class Math>
struct Chosen {
  Activation which;
  RNNKERN_DEV explicit Chosen(Activation activation) : which(activation) {}
  template <int n>
  RNNKERN_DEV void f(float (&a)[n]) const {
    with_activation<Math>(which, [&](auto functor) { Known<decltype(functor)>(which).f(a); });
  }
  template <int n>
  RNNKERN_DEV void times_df(float (&x)[n], const float (&h)[n]) const {
    with_activation<Math>(which,
                          [&](auto functor) { Known<decltype(functor)>(which).times_df(x, h); });
  }
};

// kAux, kEntry: whether the step reads Scan::aux and Scan::entry; kFeatures: whether its input is
// x, whose product is in the sums already (features.cuh), and so no `in`. Called with n elements'
// sums of the product of state and weight, which become the next state; in and aux are the step's
// elements of Scan::input and Scan::aux, entry is Scan::entry's where the row takes its first step,
// else 0.
template <class F>
struct Forward {
  static constexpr bool kAux = false, kEntry = false, kFeatures = false;
  F f;
  RNNKERN_DEV explicit Forward(Activation activation) : f(activation) {}
  template <int n>
  RNNKERN_DEV void operator()(float (&sum)[n], const float (&in)[n], const float (&)[n],
                              const float (&)[n]) const {
    RNNKERN_UNROLL
    for (int i = 0; i < n; ++i) sum[i] += in[i];
    f.f(sum);
  }
};
template <class F>
struct Layer {
  static constexpr bool kAux = false, kEntry = false, kFeatures = true;
  F f;
  RNNKERN_DEV explicit Layer(Activation activation) : f(activation) {}
  template <int n>
  RNNKERN_DEV void operator()(float (&sum)[n], const float (&)[n], const float (&)[n],
                              const float (&)[n]) const {
    f.f(sum);
  }
};
template <class F>
struct Backward {
  static constexpr bool kAux = true, kEntry = true, kFeatures = false;
  F f;
  RNNKERN_DEV explicit Backward(Activation activation) : f(activation) {}
  template <int n>
  RNNKERN_DEV void operator()(float (&sum)[n], const float (&in)[n], const float (&aux)[n],
                              const float (&entry)[n]) const {
    RNNKERN_UNROLL
    for (int i = 0; i < n; ++i) sum[i] = sum[i] + in[i] + entry[i];
    f.times_df(sum, aux);
  }
};
struct Linear {
  static constexpr bool kAux = true, kEntry = false, kFeatures = false;
  RNNKERN_DEV explicit Linear(Activation) {}
  template <int n>
  RNNKERN_DEV void operator()(float (&sum)[n], const float (&in)[n], const float (&aux)[n],
                              const float (&)[n]) const {
    RNNKERN_UNROLL
    for (int i = 0; i < n; ++i) sum[i] = in[i] + aux[i] * sum[i];
  }
};

}  // namespace rnnkern::cuda
