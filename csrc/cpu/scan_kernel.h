// The scan on one instruction set: a state vector per row, multiplied each step by a stationary
// matrix, then an elementwise epilogue that makes the next state and the output. Forward, backward
// and linear differ only in the epilogue (and in which way round the matrix was packed, and the
// direction).
//
// Panels are the outer loop of a step, so a panel is read from cache once per step for all rows.
//
// The state is kept in the accumulation type, rounded to the storage type once per step.
#pragma once
#include "product.h"

namespace rnnkern::cpu::RNNKERN_ISA {

// ---- the epilogues ----
// Each takes one vector of the product and where it belongs, stores the output there and returns
// the next state.

struct Place {
  int64_t row;     // of the (N, ...) rows
  int64_t column;  // of the group's H
  int64_t count;   // of the vector's lanes that lie within H
  int64_t at;      // the element of the (N, G*H) rows
  int64_t entry;   // the element of (G, B, H) if the row enters the scan in this step, else -1
};

template <class S, class F>
struct ForwardEpilogue {
  using V = Vec<typename Storage<S>::Acc>;
  const S* x_proj;
  S* h;
  ForwardEpilogue(const ScanParams& p, int64_t)
      : x_proj(static_cast<const S*>(p.input)), h(static_cast<S*>(p.output)) {}
  RNNKERN_INLINE V operator()(V c, const Place& p) const {
    const V out = Storage<S>::round(F::f(c + load_part(x_proj + p.at, p.count)));
    store_part(h + p.at, out, p.count);
    return out;
  }
};

// Forward from x itself, for few features: x_proj is made where it is used.
template <class S, class F>
struct LayerEpilogue {
  using A = typename Storage<S>::Acc;
  using V = Vec<A>;
  const S* x;
  const A* weight;  // (I + 1, padded H), the last row the bias
  S* h;
  int64_t features, stride;
  LayerEpilogue(const ScanParams& p, int64_t group)
      : x(static_cast<const S*>(p.input)),
        weight(static_cast<const A*>(p.input_panels) +
               group * (p.features + 1) * padded<A>(p.hidden)),
        h(static_cast<S*>(p.output)),
        features(p.features),
        stride(padded<A>(p.hidden)) {}
  RNNKERN_INLINE V operator()(V c, const Place& p) const {
    const A* w = weight + p.column;
    const S* row = x + p.row * features;
    for (int64_t i = 0; i < features; ++i, w += stride) {
      c += broadcast(load_part(row + i, 1)[0]) * load_vec<V>(w);
    }
    const V out = Storage<S>::round(F::f(c + load_vec<V>(w)));
    store_part(h + p.at, out, p.count);
    return out;
  }
};

template <class S, class F>
struct BackwardEpilogue {
  using V = Vec<typename Storage<S>::Acc>;
  const S *grad_h, *grad_h_n, *h;
  S* v;
  BackwardEpilogue(const ScanParams& p, int64_t)
      : grad_h(static_cast<const S*>(p.input)),
        grad_h_n(static_cast<const S*>(p.entry)),
        h(static_cast<const S*>(p.aux)),
        v(static_cast<S*>(p.output)) {}
  RNNKERN_INLINE V operator()(V c, const Place& p) const {
    if (grad_h) c += load_part(grad_h + p.at, p.count);
    if (grad_h_n && p.entry >= 0) c += load_part(grad_h_n + p.entry, p.count);
    const V out = Storage<S>::round(F::df(load_part(h + p.at, p.count)) * c);
    store_part(v + p.at, out, p.count);
    return out;
  }
};

template <class S>
struct LinearEpilogue {
  using V = Vec<typename Storage<S>::Acc>;
  const S *u, *gain;
  S* s;
  LinearEpilogue(const ScanParams& p, int64_t)
      : u(static_cast<const S*>(p.input)),
        gain(static_cast<const S*>(p.aux)),
        s(static_cast<S*>(p.output)) {}
  RNNKERN_INLINE V operator()(V c, const Place& p) const {
    const V out =
        Storage<S>::round(load_part(u + p.at, p.count) + load_part(gain + p.at, p.count) * c);
    store_part(s + p.at, out, p.count);
    return out;
  }
};

// ---- the skeleton ----

template <class S, class Epilogue>
void scan_rows(const ScanParams& p, int64_t group, int64_t begin, int64_t end, void* scratch) {
  using A = typename Storage<S>::Acc;
  constexpr int lanes = kLanes<A>;
  const Epilogue epilogue(p, group);
  const int64_t hidden = p.hidden, stride = padded<A>(hidden), rows = end - begin;
  const A* panels = static_cast<const A*>(p.panels) + group * hidden * stride;

  // Both buffers start with the initial state: a row of a packed batch may enter at any step.
  A* state = static_cast<A*>(scratch);
  A* next = state + rows * stride;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < hidden; j += lanes) {
      Vec<A> v = {};
      if (p.initial) {
        const auto* initial = static_cast<const S*>(p.initial);
        v = load_part(initial + (group * p.batch + begin + r) * hidden + j, hidden - j);
      }
      store_vec(state + r * stride + j, v);
      store_vec(next + r * stride + j, v);
    }
  }

  int64_t entered = begin;  // rows below have taken a step
  for (int64_t k = 0; k < p.steps; ++k) {
    const int64_t t = p.reverse[group] ? p.steps - 1 - k : k;
    const int64_t active = p.size(t) < end ? p.size(t) : end;
    if (active <= begin) continue;
    const int64_t tiles = (active - begin + kRows - 1) / kRows;
    for (int64_t column = 0; column < hidden; column += kPanel<A>) {
      const int64_t left = stride - column;
      const int vecs = static_cast<int>((left < kPanel<A> ? left : kPanel<A>) / lanes);
      int64_t row = begin;
      for (int64_t tile = 1; tile <= tiles; ++tile) {
        const int64_t tile_end = begin + (active - begin) * tile / tiles;  // even tiles
        const int tile_rows = static_cast<int>(tile_end - row);
        alignas(64) A c[kRows * kPanel<A>];
        if (p.recurrence == Recurrence::kBackward && row >= entered) {  // nothing comes from later
          for (int i = 0; i < tile_rows * vecs; ++i) store_vec(c + i * lanes, Vec<A>{});
        } else {
          find_product<A>(tile_rows, vecs, p.batch == 1)(hidden, state + (row - begin) * stride,
                                                         stride, panels + column * hidden, c);
        }
        for (const A* product = c; row < tile_end; ++row) {
          Place place = {.row = p.offset(t) + row, .column = column};
          place.at = (place.row * p.groups + group) * hidden + column;
          place.entry = row < entered ? -1 : (group * p.batch + row) * hidden + column;
          A* to = next + (row - begin) * stride + column;
          for (int v = 0; v < vecs; ++v, product += lanes, to += lanes) {
            place.count = hidden - place.column;
            store_vec(to, epilogue(load_vec<Vec<A>>(product), place));
            place.column += lanes;
            place.at += lanes;
            if (place.entry >= 0) place.entry += lanes;
          }
        }
      }
    }
    entered = entered < active ? active : entered;
    A* swap = state;
    state = next;
    next = swap;
  }
}

// ---- options become types ----

template <class S>
void scan_storage(const ScanParams& p, int64_t group, int64_t begin, int64_t end, void* state) {
  using Math = VecMath<typename Storage<S>::Acc>;
  if (p.recurrence == Recurrence::kLinear) {
    return scan_rows<S, LinearEpilogue<S>>(p, group, begin, end, state);
  }
  with_activation<Math>(p.activation, [&](auto functor) {
    using F = decltype(functor);
    if (p.recurrence == Recurrence::kForward) {
      scan_rows<S, ForwardEpilogue<S, F>>(p, group, begin, end, state);
    } else if (p.recurrence == Recurrence::kLayer) {
      scan_rows<S, LayerEpilogue<S, F>>(p, group, begin, end, state);
    } else {
      scan_rows<S, BackwardEpilogue<S, F>>(p, group, begin, end, state);
    }
  });
}

// visit(S{}) with the storage type that dtype names.
template <class Visit>
RNNKERN_INLINE auto with_storage(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kDouble:
      return visit(double{});
    case DType::kBFloat16:
      return visit(BFloat16{});
    case DType::kHalf:
      return visit(Half{});
    case DType::kFloat:
      break;
  }
  return visit(float{});
}

static int64_t panels_of(DType dtype, int64_t hidden) {
  return with_storage(dtype, [&](auto s) -> int64_t {
    using A = typename Storage<decltype(s)>::Acc;
    return (hidden + kPanel<A> - 1) / kPanel<A>;
  });
}

static int64_t packed_bytes(DType dtype, int64_t hidden) {
  return with_storage(dtype, [&](auto s) -> int64_t {
    using A = typename Storage<decltype(s)>::Acc;
    return hidden * padded<A>(hidden) * static_cast<int64_t>(sizeof(A));
  });
}

static int64_t state_bytes(DType dtype, int64_t hidden, int64_t rows) {
  return with_storage(dtype, [&](auto s) -> int64_t {
    using A = typename Storage<decltype(s)>::Acc;
    return 2 * rows * padded<A>(hidden) * static_cast<int64_t>(sizeof(A));
  });
}

static void pack_matrix(DType dtype, MatrixView matrix, int64_t hidden, int64_t first, int64_t last,
                        void* dst) {
  with_storage(dtype, [&](auto s) { pack<decltype(s)>(matrix, hidden, first, last, dst); });
}

static int64_t input_bytes(DType dtype, int64_t hidden, int64_t features) {
  return with_storage(dtype, [&](auto s) -> int64_t {
    using A = typename Storage<decltype(s)>::Acc;
    return (features + 1) * padded<A>(hidden) * static_cast<int64_t>(sizeof(A));
  });
}

static void pack_input_weights(DType dtype, const InputWeights& w, int64_t hidden, void* dst) {
  with_storage(dtype, [&](auto s) { pack_input<decltype(s)>(w, hidden, dst); });
}

static void scan(const ScanParams& params, int64_t group, int64_t begin, int64_t end, void* state) {
  with_storage(params.dtype,
               [&](auto s) { scan_storage<decltype(s)>(params, group, begin, end, state); });
}

constexpr Kernels make_kernels(const char* name) {
  return {
      .name = name,
      .packed_bytes = packed_bytes,
      .state_bytes = state_bytes,
      .input_bytes = input_bytes,
      .panels = panels_of,
      .pack = pack_matrix,
      .pack_input = pack_input_weights,
      .scan = scan,
      .outer = outer_product,
  };
}

}  // namespace rnnkern::cpu::RNNKERN_ISA
