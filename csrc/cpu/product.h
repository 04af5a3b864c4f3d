// The products of one instruction set: a matrix in packed panels times the states of a few rows,
// and the small sums of outer products that gradients are.
//
// The matrix lies in panels of kPanel columns, k-major, so that the inner loop is one broadcast of
// the state and a few multiply-adds on contiguous loads. A tile of kRows rows by one panel stays in
// registers while k runs.
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

}  // namespace rnnkern::cpu::RNNKERN_ISA
