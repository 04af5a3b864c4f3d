// The scan on one instruction set: a state vector per row, multiplied each step by a stationary
// matrix, then an elementwise epilogue that makes the next state and the output. Forward, backward
// and linear differ only in the epilogue (and in which way round the matrix was packed, and the
// direction).
//
// The matrix lies in panels of kPanel columns, k-major, so that the inner loop is one broadcast of
// the state and a few multiply-adds on contiguous loads. A tile of kRows rows by one panel stays in
// registers while k runs; panels are the outer loop, so a panel is read from cache once per step
// for all rows.
//
// The state is kept in the accumulation type, rounded to the storage type once per step.
#pragma once
#include "scan_params.h"
#include "vec.h"

namespace rnnkern::cpu::RNNKERN_ISA {

constexpr int kPanelVecs = RNNKERN_PANEL_VECS;
constexpr int kRows = 6;

template <class A>
constexpr int kPanel = kPanelVecs * kLanes<A>;

template <class A>
RNNKERN_INLINE int64_t padded(int64_t hidden) {
  return (hidden + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// ---- packing ----

// Columns [first, last) of the panels; the last panel is as narrow as whole vectors allow, zero
// beyond H.
template <class S>
void pack(MatrixView matrix, int64_t hidden, int64_t first, int64_t last, void* dst) {
  using A = typename Storage<S>::Acc;
  constexpr int lanes = kLanes<A>;
  const auto* m = static_cast<const S*>(matrix.data);
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t column = panel * kPanel<A>;
    A* out = static_cast<A*>(dst) + column * hidden;
    const int64_t left = padded<A>(hidden) - column;
    const int64_t width = left < kPanel<A> ? left : kPanel<A>;
    // A block of lanes x lanes at a time, so that a transposed read stays within a few cache lines.
    for (int64_t k0 = 0; k0 < hidden; k0 += lanes) {
      const int64_t k1 = k0 + lanes < hidden ? k0 + lanes : hidden;
      for (int64_t n0 = 0; n0 < width; n0 += lanes) {
        for (int64_t k = k0; k < k1; ++k) {
          S part[lanes] = {};
          for (int64_t n = n0; n < n0 + lanes && column + n < hidden; ++n) {
            part[n - n0] = m[k * matrix.stride_k + (column + n) * matrix.stride_n];
          }
          store_vec(out + k * width + n0, Storage<S>::load(part));
        }
      }
    }
  }
}

// weight_ih (H, I) transposed to (I, padded H), and a row more for the sum of the biases.
template <class S>
void pack_input(const InputWeights& w, int64_t hidden, void* dst) {
  using A = typename Storage<S>::Acc;
  constexpr int lanes = kLanes<A>;
  A* out = static_cast<A*>(dst);
  const auto* weight = static_cast<const S*>(w.weight.data);
  const auto* bias_ih = static_cast<const S*>(w.bias_ih);
  const auto* bias_hh = static_cast<const S*>(w.bias_hh);
  for (int64_t i = 0; i <= w.features; ++i) {
    for (int64_t j0 = 0; j0 < hidden; j0 += lanes, out += lanes) {
      const int64_t count = hidden - j0 < lanes ? hidden - j0 : lanes;
      S part[lanes] = {}, more[lanes] = {};
      for (int64_t j = 0; j < count; ++j) {
        if (i < w.features) {
          part[j] = weight[i * w.weight.stride_k + (j0 + j) * w.weight.stride_n];
        } else if (bias_ih) {
          part[j] = bias_ih[j0 + j];
          more[j] = bias_hh[j0 + j];
        }
      }
      store_vec(out, Storage<S>::load(part) + Storage<S>::load(more));
    }
  }
}

// ---- the product of a tile ----

// c (R, V vectors) = state (R, depth) * panel (depth, V vectors). Few accumulators cannot hide the
// latency of a multiply-add, so small tiles split k over several sets of them: so many that a tile
// of full_rows fills eight. Not of its own R rows: a row's sum must not depend on the tile it came
// into, or the number of threads would change the bits.
template <class A, int R, int V, int full_rows>
void product(int64_t depth, const A* __restrict state, int64_t stride, const A* __restrict panel,
             A* __restrict c) {
  constexpr int lanes = kLanes<A>;
  constexpr int full = full_rows * V;
  constexpr int sets = full >= 8 ? 1 : full >= 4 ? 2 : full >= 2 ? 4 : 8;
  Vec<A> acc[sets][R][V] = {};
  int64_t k = 0;
  for (; k + sets <= depth; k += sets) {
#pragma GCC unroll 8
    for (int s = 0; s < sets; ++s) {
      Vec<A> b[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) b[v] = load_vec<Vec<A>>(panel + ((k + s) * V + v) * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<A> a = broadcast(state[r * stride + k + s]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[s][r][v] += a * b[v];
      }
    }
  }
  for (; k < depth; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<A> a = broadcast(state[r * stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        acc[0][r][v] += a * load_vec<Vec<A>>(panel + (k * V + v) * lanes);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      Vec<A> sum = acc[0][r][v];
#pragma GCC unroll 8
      for (int s = 1; s < sets; ++s) sum += acc[s][r][v];
      store_vec(c + (r * V + v) * lanes, sum);
    }
  }
}

template <class A>
using Product = void (*)(int64_t, const A*, int64_t, const A*, A*);

template <class A, int V>
RNNKERN_INLINE Product<A> product_of_rows(int rows, bool alone) {
  if (alone) return product<A, 1, V, 1>;
  constexpr Product<A> table[] = {product<A, 1, V, kRows>, product<A, 2, V, kRows>,
                                  product<A, 3, V, kRows>, product<A, 4, V, kRows>,
                                  product<A, 5, V, kRows>, product<A, 6, V, kRows>};
  return table[rows - 1];
}

// alone: the whole batch is one row.
template <class A>
RNNKERN_INLINE Product<A> find_product(int rows, int vecs, bool alone) {
#if RNNKERN_PANEL_VECS >= 4
  if (vecs == 4) return product_of_rows<A, 4>(rows, alone);
  if (vecs == 3) return product_of_rows<A, 3>(rows, alone);
#endif
  return vecs == 2 ? product_of_rows<A, 2>(rows, alone) : product_of_rows<A, 1>(rows, alone);
}

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

// ---- gradient products of few rows ----

// out (M, K) = or += v^T a, over n rows of v (.., M) and a (.., K): where a matrix library's call
// would cost more than the product. Four rows of out at a time stay in registers.
template <class A>
void outer(const OuterParams& p) {
  constexpr int lanes = kLanes<A>, block = 4;
  const A *v = static_cast<const A*>(p.v), *a = static_cast<const A*>(p.a);
  for (int64_t m0 = 0; m0 < p.m; m0 += block) {
    const int count = p.m - m0 < block ? static_cast<int>(p.m - m0) : block;
    for (int64_t j = 0; j < p.k; j += lanes) {
      Vec<A> sum[block] = {};
      if (count == block) {
        for (int64_t n = 0; n < p.n; ++n) {
          const Vec<A> row = load_part(a + n * p.a_stride + j, p.k - j);
          const A* left = v + n * p.v_stride + m0;
#pragma GCC unroll 4
          for (int i = 0; i < block; ++i) sum[i] += broadcast(left[i]) * row;
        }
      } else {
        for (int64_t n = 0; n < p.n; ++n) {
          const Vec<A> row = load_part(a + n * p.a_stride + j, p.k - j);
          for (int i = 0; i < count; ++i) sum[i] += broadcast(v[n * p.v_stride + m0 + i]) * row;
        }
      }
      for (int i = 0; i < count; ++i) {
        A* out = static_cast<A*>(p.out) + (m0 + i) * p.k + j;
        if (p.add) sum[i] += load_part(out, p.k - j);
        store_part(out, sum[i], p.k - j);
      }
    }
  }
}

static void outer_product(DType dtype, const OuterParams& params) {
  dtype == DType::kDouble ? outer<double>(params) : outer<float>(params);
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
