#include "products.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "packed.h"
#include "threads.h"

namespace rnnkern::cpu {
namespace {

using at::Tensor;

// Operations of a product below which another thread does not pay: it has to be woken, and where
// another program has its core it is waited for. Forward on two threads at (B, T, I, H) = (1, 256,
// 64, 64), whose product is 2.1e6: 45 us either way; 1400 us where another program has one of two
// cores, and 60 if one thread does it all. At 2.6e6, (64, 10, 32, 64), two threads take 50 us and
// one 65.
constexpr double kProductFlops = 1.25e6;
// Rows of a product that one task takes: a few tiles of the largest, and so many that they stay in
// the second-level cache beside the panel: in float32, a quarter of it. (Of the 2 MB of a Xeon 3 to
// 8 % faster than an eighth, and than a half, at 256 to 1024 features; of the 512 KB of a Zen 3 2
// to 10 % faster than all.)
constexpr int64_t kBlockRows = 24, kMostBlockRows = 192, kBlockShare = 16;

// The least that AMX makes of float32's parts (DType::kSplit), which take time to make. AVX-512's
// time / AMX's on two threads, of so many rows, k's and columns: (512, 128, 128) 0.73; (256, 256,
// 256) 1.02; (128, 512, 512) 1.1, (128, 2048, 2048) 1.35, (256, 1024, 1024) 1.35, (511, 256, 512)
// 1.35; (64, 2048, 2048) 1.0.
constexpr int64_t kSplitSide = 128, kSplitProduct = 1 << 25;
// Rows of such a product from which its panels are all packed first. Below, elements of a weight
// from which none are kept: with a copy (128, 2048, 2048) takes 1.2 times as long, (200, 2048,
// 1024) 0.95.
constexpr int64_t kManyRows = 512, kMostKeptParts = 1 << 22;
// Elements of the rows that one task takes, which are half as large again, and the least rows.
constexpr int64_t kSplitElements = 131072, kSplitBlockRows = 32;

// The k's of a matrix, whose rows lie as a panel's do, up to which it is not packed: each of its
// rows is read as often as there are tiles. Packed and so, on one thread of a Zen 4, rows, k's and
// columns: (80, 16, 1) 1.2 us and 0.7, (2048, 8, 8) 24 and 9, (2048, 3, 1695) 2100 and 800, (2048,
// 32, 64) 83 and 77; by AVX2 97 and 100.
constexpr int64_t kDirectDepth = 32;

// How a product of float32 is made: of so many rows, of many k's and columns, as sums of bfloat16.
DType product_type(DType dtype, int64_t rows, int64_t depth, int64_t width) {
  const bool pays =
      std::min({rows, depth, width}) >= kSplitSide && rows * depth * width >= kSplitProduct;
  return dtype == DType::kFloat && kernels().splits && pays ? DType::kSplit : dtype;
}

// How many of the tasks of a product make up a thread's least.
int64_t product_grain(int64_t tasks, double flops) {
  return std::max<int64_t>(
      1, static_cast<int64_t>(std::ceil(kProductFlops * tasks / std::max(flops, 1.0))));
}

}  // namespace

bool side_by_side(int64_t groups, double flops) {
  const double threads = at::get_num_threads();
  return groups > 1 && threads > 1 && flops * static_cast<double>(groups) >= 2 * kProductFlops &&
         flops < 6 * kProductFlops * threads;
}

void for_each_group(int64_t groups, double flops, const std::function<void(int64_t)>& f) {
  const int64_t threads = at::get_num_threads();
  const int64_t grain = side_by_side(groups, flops) ? (groups + threads - 1) / threads : groups;
  for_each_range(groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) f(g);
  });
}

// Of more rows than one block, threads share the rows, and copy each block. Parts of float32 that
// must be made again, as those of infinite sums, are made of a.
bool in_place(int64_t rows, const Tensor& weight) {
  const int64_t depth = weight.size(0), width = weight.size(1);
  return depth == width && depth > kDirectDepth && rows > kMostBlockRows &&
         product_type(parse_dtype(weight.scalar_type()), rows, depth, width) != DType::kSplit;
}

void matmul(const RowsView& a, const Tensor& weight, bool transposed, const Tensor& bias_ih,
            const Tensor& bias_hh, void* out, int64_t out_stride, bool add) {
  const MatrixView matrix = view_of(weight, transposed);
  if (a.rows == 0 || matrix.width == 0) return;
  const Kernels& isa = kernels();
  const DType dtype =
      product_type(parse_dtype(weight.scalar_type()), a.rows, matrix.depth, matrix.width);
  // Borrowed: in threads side by side, to count one more owner of each took 2 to 3 us.
  const auto contiguous = [](const Tensor& t) {
    return t.defined() ? t.expect_contiguous() : c10::MaybeOwned<Tensor>::borrowed(t);
  };
  const auto b = contiguous(bias_ih), c = contiguous(bias_hh);
  const bool split = dtype == DType::kSplit;
  const bool direct = weight.element_size() >= 4 && matrix.stride_n == 1 &&
                      matrix.depth <= kDirectDepth && !b->defined();
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t depth = std::max<int64_t>(1, matrix.depth);
  const int64_t each = std::max(kSplitBlockRows, (a.rows + threads - 1) / threads);
  const int64_t block =
      split ? std::clamp(kSplitElements / depth, kSplitBlockRows, std::min(kMostBlockRows, each))
            : std::clamp(cache_bytes(2) / kBlockShare / depth, kBlockRows, kMostBlockRows);
  // As many for each thread that has any: of 512 rows in three blocks one would have two.
  const double flops = 2.0 * a.rows * matrix.depth * matrix.width;
  const auto parts_of = [&](int64_t tasks) {
    return std::clamp<int64_t>(tasks / product_grain(tasks, flops), 1, threads);
  };
  const int64_t least = (a.rows + block - 1) / block, sharing = parts_of(least);
  const int64_t blocks = (least + sharing - 1) / sharing * sharing;
  // Threads share the rows or, of few, the panels: all rows then meet a panel at once, so it is
  // packed just before, where it stays in cache. To write all panels to memory would take longer.
  // But of parts each thread makes its own of all rows: not where those are more than all panels.
  const bool by_panels =
      blocks == 1 || (split && a.rows < kManyRows && a.rows * threads <= matrix.width);
  // A kept copy of parts is half as large again as the weight, and so can take longer to read.
  const bool keeps =
      !direct && (!split || !by_panels || matrix.depth * matrix.width < kMostKeptParts);
  const Tensor panels = keeps ? kept_weight(weight, transposed, dtype) : Tensor();
  MatmulParams p = {a.data,
                    panels.defined() ? panels.const_data_ptr() : nullptr,
                    matrix,
                    b->defined() ? b->const_data_ptr() : nullptr,
                    c->defined() ? c->const_data_ptr() : nullptr,
                    out,
                    a.stride,
                    out_stride,
                    add,
                    direct};
  const int64_t width = panels_of(dtype, matrix.width), tasks = by_panels ? width : blocks;
  const bool packs = !panels.defined() && !direct;
  const Scratch packed(packs && !by_panels ? isa.packed_bytes(dtype, matrix.depth, matrix.width)
                                           : 0);
  if (packs && !by_panels) {
    if (matrix.depth > 0) pack(matrix, dtype, packed.data());
    p.panels = packed.data();
  }
  const int64_t parts = parts_of(tasks);
  const int64_t rows = by_panels ? a.rows : block;
  const bool copies = split || weight.element_size() == 2 || out == a.data;
  const int64_t bytes =
      aligned(copies ? rows * isa.row_bytes(dtype, matrix.depth) : 0) +
      aligned(packs && by_panels ? isa.packed_bytes(dtype, matrix.depth, isa.panel_columns(dtype))
                                 : 0);
  const Scratch memory(parts * bytes);
  uint8_t* const base = memory.data();
  for_each_range(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = tasks * i / parts, last = tasks * (i + 1) / parts;
      if (by_panels) {
        isa.matmul(dtype, p, 0, a.rows, first, last, base + i * bytes);
        continue;
      }
      for (int64_t j = first; j < last; ++j) {
        isa.matmul(dtype, p, a.rows * j / blocks, a.rows * (j + 1) / blocks, 0, width,
                   base + i * bytes);
      }
    }
  });
}

namespace {

// Whether a sum of outer products is better made of the rows as they lie, each read as often as
// there are tiles, than of packed ones: where those are few or, of more columns, in cache. On one
// thread of a Zen 4, packed and so, (N, M, width): (80, 16, 16) 1.4 us and 0.4, (8192, 16, 1) 134
// and 54, (512, 64, 64) 48 and 39, (8192, 64, 64) 783 and 636, (8192, 512, 64) 6170 and 8800.
bool is_direct(const OuterParams& p) {
  constexpr int64_t few = 32, side = 64, elements = 1 << 20;
  return std::max(p.m, p.width) <= few ||
         (std::min(p.m, p.width) <= side && p.n * (p.m + p.width) <= elements);
}

// Of elements of so many bytes; those of the result have at least four.
void outer_sums(OuterParams p, at::ScalarType scalar, int64_t element) {
  const Kernels& isa = kernels();
  const DType dtype = product_type(parse_dtype(scalar), p.n, p.m, p.width);
  p.direct = element >= 4 && is_direct(p);
  // Threads share the rows of the result, each reading all of a; of few rows, the columns.
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t tiles = isa.outer_tiles(dtype, p.m), panels = panels_of(dtype, p.width);
  const bool by_columns = tiles < threads && panels > tiles;
  const int64_t tasks = by_columns ? panels : tiles, columns = isa.panel_columns(dtype);
  const double flops = 2.0 * p.n * p.m * p.width;
  const int64_t parts = std::clamp<int64_t>(tasks / product_grain(tasks, flops), 1, threads);
  // In one allocation of this thread's: what others allocate, their heaps keep.
  const int64_t bytes = p.direct ? 0 : aligned(isa.outer_bytes(dtype, p.n, p.m, p.width));
  const Scratch memory(parts * bytes);
  uint8_t* const base = memory.data();
  for_each_range(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = tasks * i / parts, last = tasks * (i + 1) / parts;
      if (!by_columns) {
        isa.outer(dtype, p, first, last, base + i * bytes);
        continue;
      }
      OuterParams part = p;
      const auto at = [&](const void* start) {
        return start ? static_cast<const char*>(start) + first * columns * element : nullptr;
      };
      part.a = at(p.a);
      part.initial = at(p.initial);
      part.out = static_cast<char*>(p.out) + first * columns * std::max<int64_t>(element, 4);
      part.width = std::min(p.width, last * columns) - first * columns;
      isa.outer(dtype, part, 0, tiles, base + i * bytes);
    }
  });
}

}  // namespace

void outer(const OuterParams& p, at::ScalarType scalar) {
  if (p.m == 0 || p.width == 0) return;
  const int64_t element = static_cast<int64_t>(c10::elementSize(scalar));
  if (p.n == 0) {
    for (int64_t m = 0; m < p.m; ++m) {
      std::memset(static_cast<char*>(p.out) + m * p.out_stride * element, 0, p.width * element);
    }
    return;
  }
  if (element > 2) return outer_sums(p, scalar, element);
  const Tensor sums = at::detail::empty_cpu({p.m, p.width}, at::kFloat, /*pin_memory=*/false);
  OuterParams wide = p;
  wide.out = sums.mutable_data_ptr();
  wide.out_stride = p.width;
  outer_sums(wide, scalar, element);
  at::from_blob(p.out, {p.m, p.width}, {p.out_stride, 1}, scalar).copy_(sums);
}

void column_sums(const RowsView& v, int64_t width, at::ScalarType scalar, void* out) {
  const Kernels& isa = kernels();
  const DType dtype = parse_dtype(scalar);
  const int64_t panels = panels_of(dtype, width);
  const int64_t elements = std::max<int64_t>(1, v.rows * width);
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask * panels / elements);
  for_each_range(panels, grain, [&](int64_t first, int64_t last) {
    isa.column_sums(dtype, v.data, v.rows, v.stride, width, first, last, out);
  });
}

}  // namespace rnnkern::cpu
