// The scan on one instruction set: a state vector per row, multiplied each step by a stationary
// matrix, then an elementwise epilogue that makes the next state and the output. Forward, backward
// and linear differ only in the epilogue (and in which way round the matrix was packed, and the
// direction).
//
// Here options become types, and the kernels a table of functions.
#pragma once
#include <type_traits>

#include "hash.h"
#include "outer.h"
#include "scan_panel.h"
#include "scan_row.h"

namespace rnnkern::cpu::RNNKERN_ISA {

// small: whether there is code for small matrices. All types and activations would double the
// library.
template <bool small, class S, class Epilogue>
void scan_any(const ScanParams& p, const Part& part, Member* member) {
  if constexpr (small) {
    if (!member && p.hidden <= kPanel<S>) return scan_small<S, Epilogue>(p, part);
  }
  if (p.batch > 1) return scan_rows<S>(p, part, member, finish<S, Epilogue>);
  if constexpr (small) {
    const auto inlined =
        [](const ScanParams& p, Made<S>& made, int64_t pieces)
            __attribute__((always_inline)) { finish<S, Epilogue>(p, made, pieces); };
    scan_row<S>(p, part, member, inlined);
  } else {
    scan_row<S, Finish<S>>(p, part, member, finish<S, Epilogue>);
  }
}

template <class S>
void scan_storage(const ScanParams& p, const Part& part, Member* member) {
  using Math = VecMath<typename Storage<S>::Acc>;
  constexpr bool single = std::is_same_v<S, float>;
  if (p.recurrence == Recurrence::kLinear) {
    return scan_any<single, S, LinearEpilogue<S>>(p, part, member);
  }
  with_activation<Math>(p.activation, [&](auto functor) {
    using F = decltype(functor);
    constexpr bool small =
        single && (std::is_same_v<F, Tanh<Math>> || std::is_same_v<F, Relu<Math>>);
    if (p.recurrence == Recurrence::kForward || std::is_same_v<S, Quantized>) {
      scan_any<small, S, ForwardEpilogue<S, F>>(p, part, member);
    } else if constexpr (std::is_same_v<S, Quantized>) {
    } else if (p.recurrence == Recurrence::kLayer) {
      scan_any<small, S, LayerEpilogue<S, F>>(p, part, member);
    } else {
      scan_any<small, S, BackwardEpilogue<S, F>>(p, part, member);
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
    case DType::kInt8:
      return visit(Quantized{});
#ifdef __AMX_BF16__
    case DType::kSplit:
      return visit(Split{});
#endif
    default:
      break;
  }
  return visit(float{});
}

static int64_t panel_columns(DType dtype) {
  return with_storage(
      dtype, [&](auto s) -> int64_t { return kPanel<typename Storage<decltype(s)>::Acc>; });
}

static int64_t packed_bytes(DType dtype, int64_t depth, int64_t width) {
  return with_storage(dtype, [&](auto s) -> int64_t {
    using D = Dot<decltype(s)>;
    const auto size = static_cast<int64_t>(sizeof(typename D::Element));
    return panel_depth<D>(depth) * padded<typename D::A>(width) * size;
  });
}

static int64_t row_bytes(DType dtype, int64_t width) {
  return with_storage(dtype, [&](auto s) -> int64_t {
    using D = Dot<decltype(s)>;
    return row_stride<D>(width) * static_cast<int64_t>(sizeof(typename D::Element));
  });
}

static int64_t input_bytes(DType dtype, int64_t hidden, int64_t features) {
  return with_storage(dtype, [&](auto s) -> int64_t {
    using A = typename Storage<decltype(s)>::Acc;
    return (features + 1) * padded<A>(hidden) * static_cast<int64_t>(sizeof(A));
  });
}

#ifdef RNNKERN_EMULATED
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif
#ifdef __AMX_BF16__
constexpr bool kSplits = true;
#else
constexpr bool kSplits = false;
#endif

// Whether there are large products of bfloat16, which are multiplied as float32. Where pairs of
// them are multiplied, torch does that too.
constexpr bool kWidens = Dot<BFloat16>::kDepth == 1;

static bool has_products(DType dtype) { return dtype != DType::kBFloat16 || kWidens; }

// visit(S{}) with the storage type of a large product.
template <class Visit>
RNNKERN_INLINE auto with_product(DType dtype, Visit visit) {
#ifdef __AMX_BF16__
  if (dtype == DType::kSplit) return visit(Split{});
#endif
  if (dtype == DType::kDouble) return visit(double{});
  if (dtype == DType::kHalf) return visit(Half{});
  if constexpr (kWidens) {
    if (dtype == DType::kBFloat16) return visit(BFloat16{});
  }
  return visit(float{});
}

static int64_t outer_tiles(DType dtype, int64_t m) {
  return with_product(dtype, [&](auto s) -> int64_t {
    constexpr int64_t rows = kOuterTile<Dot<decltype(s)>>;
    return (m + rows - 1) / rows;
  });
}

static int64_t outer_bytes(DType dtype, int64_t n, int64_t m, int64_t width) {
  return with_product(dtype, [&](auto s) -> int64_t {
    using D = Dot<decltype(s)>;
    const int64_t deep = min_of(n, kOuterDepth);
    const int64_t rows = min_of(outer_tiles(dtype, m) * kOuterTile<D>, kOuterRows);
    const int64_t columns = min_of(padded<typename D::A>(width), kOuterWidth<D>);
    return outer_lots<D>(n, width, outer_tiles(dtype, m)) *
           (elements<D>(deep) * columns + row_stride<D>(deep) * rows) *
           static_cast<int64_t>(sizeof(typename D::Element));
  });
}

static void pack_matrix(DType dtype, const MatrixView& matrix, int64_t first, int64_t last,
                        void* dst) {
  with_storage(dtype, [&](auto s) { pack<decltype(s)>(matrix, first, last, dst); });
}

static void pack_input_weights(DType dtype, const InputWeights& w, void* dst) {
  with_storage(dtype, [&](auto s) { pack_input<decltype(s)>(w, dst); });
}

static void start(const ScanParams& params, const Part& part) {
  with_storage(params.dtype, [&](auto s) {
    for (int64_t i = 0; i < part.groups; ++i) {
      start_rows<decltype(s)>(params, part.group + i, part.begin, part.end,
                              static_cast<char*>(part.state) + i * part.state_bytes);
    }
  });
}

static void scan(const ScanParams& params, const Part& part, Member* member) {
  with_storage(params.dtype, [&](auto s) { scan_storage<decltype(s)>(params, part, member); });
}

static void matmul_rows(DType dtype, const MatmulParams& params, int64_t begin, int64_t end,
                        int64_t first, int64_t last, void* scratch) {
  with_product(dtype,
               [&](auto s) { matmul<decltype(s)>(params, begin, end, first, last, scratch); });
}

static void outer_sums(DType dtype, const OuterParams& params, int64_t first, int64_t last,
                       void* scratch) {
  with_product(dtype, [&](auto s) { outer<decltype(s)>(params, first, last, scratch); });
}

static void sum_columns(DType dtype, const void* v, int64_t n, int64_t v_stride, int64_t width,
                        int64_t first, int64_t last, void* out) {
  with_product(dtype, [&](auto s) {
    using S = std::conditional_t<std::is_same_v<decltype(s), Split>, float, decltype(s)>;
    column_sums(static_cast<const S*>(v), n, v_stride, width, first, last, static_cast<S*>(out));
  });
}

constexpr Kernels make_kernels(const char* name) {
  return {
      .name = name,
      .emulated = kEmulated,
      .splits = kSplits,
      .has_products = has_products,
      .panel_columns = panel_columns,
      .packed_bytes = packed_bytes,
      .row_bytes = row_bytes,
      .input_bytes = input_bytes,
      .pack = pack_matrix,
      .pack_input = pack_input_weights,
      .hash = hash,
      .start = start,
      .scan = scan,
      .matmul = matmul_rows,
      .outer_tiles = outer_tiles,
      .outer_bytes = outer_bytes,
      .outer = outer_sums,
      .column_sums = sum_columns,
  };
}

}  // namespace rnnkern::cpu::RNNKERN_ISA
