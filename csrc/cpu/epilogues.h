// The epilogues: what a step does with its products, elementwise, recurrence by recurrence.
//
// Each takes n vectors of the product and where they belong, stores the output there, and leaves
// the next state in their place.
#pragma once
#include <type_traits>

#include "product.h"
#include "vec_math.h"

namespace rnnkern::cpu::RNNKERN_ISA {

constexpr int kInStep = 4;  // vectors that an epilogue takes at most

struct Place {
  int64_t group;
  int64_t row;     // of the batch
  int64_t column;  // of the group's H
  int64_t count;   // of the vector's lanes that lie within H
  int64_t in;      // where the group's input of the row begins
  int64_t at;      // the element of the (N, G*H) rows
  int64_t entry;   // the element of (G, B, H) if the row enters the scan in this step, else -1
};

// f of n vectors. Tanh's are computed in step.
template <class F, int n, class V>
RNNKERN_INLINE void activate(V* a) {
  using Math = VecMath<std::decay_t<decltype(V{}[0])>>;
  if constexpr (std::is_same_v<F, Tanh<Math>>) {
    Math::template tanh<n>(a);
  } else {
    for (int i = 0; i < n; ++i) a[i] = F::f(a[i]);
  }
}

template <class S, class F>
struct ForwardEpilogue {
  using V = Vec<typename Storage<S>::Acc>;
  const S* x_proj;
  S* h;
  explicit ForwardEpilogue(const ScanParams& p)
      : x_proj(static_cast<const S*>(p.input)), h(static_cast<S*>(p.output)) {}
  template <int n>
  RNNKERN_INLINE void run(V* c, const Place* p) const {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      c[i] += load_part(x_proj + p[i].in + p[i].column, p[i].count);
    }
    activate<F, n>(c);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      c[i] = rounded<S>(c[i]);
      store_part(h + p[i].at, c[i], p[i].count);
    }
  }
};

// Forward from x itself, for few features: x_proj is made where it is used.
template <class S, class F>
struct LayerEpilogue {
  using A = typename Storage<S>::Acc;
  using V = Vec<A>;
  const S* x;
  const A* weight;  // G (I + 1, padded H), the last row of each the bias
  S* h;
  int64_t features, stride;
  explicit LayerEpilogue(const ScanParams& p)
      : x(static_cast<const S*>(p.input)),
        weight(static_cast<const A*>(p.input_panels)),
        h(static_cast<S*>(p.output)),
        features(p.features),
        stride(padded<A>(p.hidden)) {}
  template <int n>
  RNNKERN_INLINE void run(V* c, const Place* p) const {
    // Added up without c, which the processor still waits for.
    const A* w[n];
    V sums[n];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      w[i] = weight + p[i].group * (features + 1) * stride + p[i].column;
      sums[i] = load_vec<V>(w[i] + features * stride);
    }
    for (int64_t k = 0; k < features; ++k) {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) {
        const A feature = load_one(x + p[i].in + k);
        sums[i] += broadcast(feature) * load_vec<V>(w[i] + k * stride);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) c[i] += sums[i];
    activate<F, n>(c);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      c[i] = rounded<S>(c[i]);
      store_part(h + p[i].at, c[i], p[i].count);
    }
  }
};

template <class S, class F>
struct BackwardEpilogue {
  using V = Vec<typename Storage<S>::Acc>;
  const S *grad_h, *grad_h_n, *h;
  S* v;
  explicit BackwardEpilogue(const ScanParams& p)
      : grad_h(static_cast<const S*>(p.input)),
        grad_h_n(static_cast<const S*>(p.entry)),
        h(static_cast<const S*>(p.aux)),
        v(static_cast<S*>(p.output)) {}
  template <int n>
  RNNKERN_INLINE void run(V* c, const Place* p) const {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      if (grad_h) c[i] += load_part(grad_h + p[i].at, p[i].count);
      if (grad_h_n && p[i].entry >= 0) c[i] += load_part(grad_h_n + p[i].entry, p[i].count);
      c[i] = rounded<S>(F::df(load_part(h + p[i].at, p[i].count)) * c[i]);
      store_part(v + p[i].at, c[i], p[i].count);
    }
  }
};

template <class S>
struct LinearEpilogue {
  using V = Vec<typename Storage<S>::Acc>;
  const S *u, *gain;
  S* s;
  explicit LinearEpilogue(const ScanParams& p)
      : u(static_cast<const S*>(p.input)),
        gain(static_cast<const S*>(p.aux)),
        s(static_cast<S*>(p.output)) {}
  template <int n>
  RNNKERN_INLINE void run(V* c, const Place* p) const {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      c[i] = rounded<S>(load_part(u + p[i].at, p[i].count) +
                        load_part(gain + p[i].at, p[i].count) * c[i]);
      store_part(s + p[i].at, c[i], p[i].count);
    }
  }
};

}  // namespace rnnkern::cpu::RNNKERN_ISA
