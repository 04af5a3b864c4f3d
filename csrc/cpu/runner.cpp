#include "runner.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/core/CPUAllocator.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>

#include "packed.h"
#include "team.h"

namespace rnnkern::cpu {
namespace {

// Operations of a scan, and of a product, below which another thread does not pay: it has to be
// woken, and where another program has its core it is waited for. Forward on two threads at (B, T,
// I, H) = (1, 256, 64, 64), whose product is 2.1e6: 45 us either way; 1400 us where another program
// has one of two cores, and 60 if one thread does it all. At 2.6e6, (64, 10, 32, 64), two threads
// take 50 us and one 65. Eight groups of (1, 100, 1, 16) take 14 us either way between other calls,
// a training step 187 and 172.
constexpr double kFlopsPerThread = 1e6, kStepFlops = 2e3, kProductFlops = 1.25e6;
// Groups run side by side while their matrices fit the first-level cache together. A step of one of
// 8 groups of one row: H 16 9 ns, 20 one after another; H 32 24 and 28.
constexpr int64_t kSideBySide = 32 * 1024;
constexpr int64_t kElementsPerPackTask = 65536;
// Columns are shared, by threads that meet after every step, where there are at most so many rows a
// thread, and so many multiply-adds a step (an estimate). A matrix larger than a core's cache is
// worth it with many more rows: each thread then reads only its part of it. Forward on two threads
// of a Xeon with 2 MB each, columns shared / rows shared: (B, H) = (4, 512) 0.8, (8, 512) 1.04,
// (16, 512) 1.1, (8, 768) 0.84, (32, 768) 0.9, (16, 1024) 0.76, (32, 1024) 0.94, (64, 2048) 0.92.
constexpr int64_t kTeamRows = 2, kTeamRowsOfLarge = 32, kTeamWork = 65536, kLargeMatrix = 2 << 20;
// Elements of a weight from which it pays to keep it packed: below, packing costs next to nothing.
constexpr int64_t kLeastKept = 256 * 256;
// Rows of a product that one task takes: a few tiles of the largest, and so many that they stay in
// the second-level cache beside the panel (half a megabyte: 3 to 8 % faster than a quarter, and
// than one, at 256 to 1024 features).
constexpr int64_t kBlockRows = 24, kMostBlockRows = 192, kBlockElements = 131072;

// The least that AMX makes of float32's parts (DType::kSplit), which take time to make. AVX-512's
// time / AMX's on two threads. Of a scan, rows and H, forward and backward: (16, 256) 0.96, 0.87;
// (32, 256) 1.02, 1.02; (128, 256) 1.11, 1.23; (16, 384) 1.1, 0.97; (128, 512) 1.31, 1.29. Of a
// product, rows, k's and columns: (512, 128, 128) 0.73; (256, 256, 256) 1.02; (128, 512, 512) 1.1,
// (128, 2048, 2048) 1.35, (256, 1024, 1024) 1.35, (511, 256, 512) 1.35; (64, 2048, 2048) 1.0.
constexpr int64_t kSplitBatch = 24, kSplitHidden = 256, kSplitSteps = 512;
constexpr int64_t kSplitSide = 128, kSplitProduct = 1 << 25;
// Rows of such a product from which its panels are all packed first. Below, elements of a weight
// from which none are kept: with a copy (128, 2048, 2048) takes 1.2 times as long, (200, 2048,
// 1024) 0.95.
constexpr int64_t kManyRows = 512, kMostKeptParts = 1 << 22;
// Elements of the rows that one task takes, which are half as large again, and the least rows.
constexpr int64_t kSplitElements = 131072, kSplitBlockRows = 32;

// What lies one after another in one allocation: the packed weights, the tasks' states.
int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
// Bytes between a state and what another thread reads or writes: a processor fetches beyond what it
// reads, and so would take the state from its thread in every step. 1024 steps of two groups of one
// row, H 64, a thread each: 155 us without, 143 with 256 bytes before the states, 104 with 1024
// around each; one group alone takes 105 to 112.
constexpr int64_t kApart = 1024;

DType parse_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return DType::kDouble;
    case at::kFloat:
      return DType::kFloat;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kHalf;
    default:
      TORCH_CHECK_TYPE(
          false, "rnnkern on the CPU computes float64, float32, bfloat16 and float16, got ", dtype);
  }
}

// at::parallel_for, but without its bookkeeping where there is nothing to share out.
template <class F>
void for_each_range(int64_t count, int64_t grain, const F& f) {
  if (count <= grain || at::get_num_threads() == 1) {
    f(0, count);
  } else {
    at::parallel_for(0, count, grain, f);
  }
}

}  // namespace

namespace {

// Whether this process may use AMX: the processor has it, and Linux grants its large registers.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25,
                     kAll = kBf16 | kTile | kInt8;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Whether torch has fast products of these here.
bool knows_bfloat16() {
#ifdef __x86_64__
  return at::get_cpu_capability() == "AVX512";
#else
  return true;
#endif
}
bool knows_half() {
#ifdef __x86_64__
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAvx512Fp16 = 1u << 23;
  return knows_bfloat16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAvx512Fp16);
#else
  return true;
#endif
}

// The kernels that this machine can run, each better than those before it.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> all = {&kDefaultKernels};
#ifdef __x86_64__
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX2" || capability == "AVX512") all.push_back(&kAvx2Kernels);
  if (capability != "AVX512") return all;
  all.push_back(&kAvx512Kernels);
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
    all.push_back(&kAvx512Bf16Kernels);
    if (has_amx()) all.push_back(&kAmxKernels);
  }
#endif
  return all;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = [] {
    const std::vector<const Kernels*> all = runnable();
    const char* asked = std::getenv("RNNKERN_CPU_CAPABILITY");
    if (!asked || !*asked) return all.back();
    std::string names;
    for (const Kernels* kernels : all) {
      if (std::string(asked) == kernels->name) return kernels;
      names += std::string(names.empty() ? "" : ", ") + kernels->name;
    }
    TORCH_CHECK_VALUE(false, "RNNKERN_CPU_CAPABILITY: expected one of those that run here, ", names,
                      ", got ", asked);
  }();
  return *chosen;
}

std::unique_ptr<bool[]> flag_array(Flags reverse, bool flipped) {
  auto flags = std::make_unique<bool[]>(reverse.size());
  for (size_t g = 0; g < reverse.size(); ++g) flags[g] = (reverse[g] != 0) != flipped;
  return flags;
}

ScanParams make_params(Recurrence recurrence, const Tensor& x, at::TensorList weight,
                       const bool* reverse) {
  ScanParams p = {};
  p.recurrence = recurrence;
  p.dtype = parse_dtype(x.scalar_type());
  p.hidden = weight[0].size(0);
  // An expanded weight needs no memory of its own; its packed copy's size must not overflow.
  TORCH_CHECK_VALUE(p.hidden <= (int64_t{1} << 28), "rnnkern: expected H of at most 2^28, got ",
                    p.hidden);
  p.groups = static_cast<int64_t>(weight.size());
  p.input_stride = p.groups * p.hidden;
  p.input_apart = p.hidden;
  p.reverse = reverse;
  return p;
}

namespace {

int64_t panels_of(DType dtype, int64_t width) {
  const int64_t columns = kernels().panel_columns(dtype);
  return (width + columns - 1) / columns;
}

void pack(const MatrixView& matrix, DType dtype, void* dst) {
  const Kernels& isa = kernels();
  const int64_t panels = panels_of(dtype, matrix.width);
  const int64_t grain =
      std::max<int64_t>(1, kElementsPerPackTask * panels / (matrix.depth * matrix.width));
  for_each_range(panels, grain,
                 [&](int64_t first, int64_t last) { isa.pack(dtype, matrix, first, last, dst); });
}

// Memory for the length of a call. Where it is little, the thread's own, kept: small calls are made
// one after another, and each allocation of a kilobyte or more has the heap tidied up.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : of_thread_(0 < bytes && bytes <= kSmall && !small_.taken) {
    if (of_thread_) {
      small_.taken = true;
      data_ = small_.bytes;
    } else {
      memory_ = c10::GetCPUAllocator()->allocate(bytes);
      data_ = static_cast<uint8_t*>(memory_.get());
    }
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    if (of_thread_) small_.taken = false;
  }
  uint8_t* data() const { return data_; }

 private:
  static constexpr int64_t kSmall = 1 << 15;
  struct Small {
    alignas(64) uint8_t bytes[kSmall];
    bool taken;
  };
  static thread_local Small small_;

  bool of_thread_;
  at::DataPtr memory_;
  uint8_t* data_;
};
thread_local Scratch::Small Scratch::small_ = {};

// The matrix W^T or, transposed, W.
MatrixView view_of(const Tensor& w, bool transposed) {
  const int k = transposed ? 0 : 1, n = 1 - k;
  return {w.const_data_ptr(), w.stride(k), w.stride(n), w.size(k), w.size(n)};
}

// False also where the sum of a finite matrix overflows.
bool all_finite(at::TensorList weight) {
  for (const Tensor& w : weight) {
    if (w.is_floating_point() && !std::isfinite(w.sum().item<double>())) return false;
  }
  return true;
}

// Who computes one panel of one step.
class OnePanel final : public Member {
 public:
  explicit OnePanel(int64_t panel) : panel_(panel) {}
  Columns begin(int64_t) override { return {panel_, panel_ + 1}; }
  void end(int64_t) override {}

 private:
  int64_t panel_;
};

// W^T packed, if this is inference with a weight of which a packed copy is kept; else undefined.
Tensor kept_weight(const Tensor& w, bool transposed, DType dtype) {
  const bool frozen = dtype == DType::kInt8 || !at::GradMode::is_enabled();
  if (transposed || !frozen || w.numel() < kLeastKept || !w.is_contiguous()) return Tensor();
  static auto* const kept = new PackedWeights;  // never destroyed: threads may outlive main()
  const MatrixView matrix = view_of(w, transposed);
  return kept->find(w, kernels().packed_bytes(dtype, matrix.depth, matrix.width),
                    [&](void* dst) { pack(matrix, dtype, dst); });
}

// visit(panel's number, its first column, columns, the packed panel) for every panel of a matrix:
// of `kept`, or packed for this one visit.
template <class Visit>
void for_each_panel(const MatrixView& matrix, DType dtype, const Tensor& kept, int64_t grain,
                    const Visit& visit) {
  const Kernels& isa = kernels();
  const int64_t columns = isa.panel_columns(dtype);
  const int64_t bytes = isa.packed_bytes(dtype, matrix.depth, columns);
  const bool single = dtype == DType::kFloat || dtype == DType::kSplit;
  const int64_t element = dtype == DType::kDouble ? 8 : single ? 4 : dtype == DType::kInt8 ? 1 : 2;
  for_each_range(panels_of(dtype, matrix.width), grain, [&](int64_t first, int64_t last) {
    const Scratch memory(kept.defined() ? 0 : bytes);
    for (int64_t i = first; i < last; ++i) {
      const int64_t column = i * columns, width = std::min(columns, matrix.width - column);
      if (kept.defined()) {
        visit(i, column, width, kept.const_data_ptr<uint8_t>() + i * bytes);
        continue;
      }
      MatrixView part = matrix;
      part.data = static_cast<const char*>(matrix.data) + column * matrix.stride_n * element;
      part.width = width;
      isa.pack(dtype, part, 0, 1, memory.data());
      visit(i, column, width, static_cast<const void*>(memory.data()));
    }
  });
}

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

bool has_products(at::ScalarType dtype) {
  if (dtype == at::kFloat || dtype == at::kDouble) return true;
  // In 16 bits torch multiplies well only with the instructions for it: on a Zen 3, which has none,
  // the input products of bfloat16 of (64, 128, 512, 512) took 439 ms, and those of float32 32.
  static const bool slow[] = {!knows_bfloat16(), !knows_half()};
  return slow[dtype == at::kHalf] && kernels().has_products(parse_dtype(dtype));
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
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t depth = std::max<int64_t>(1, matrix.depth);
  const int64_t each = std::max(kSplitBlockRows, (a.rows + threads - 1) / threads);
  const int64_t block =
      split ? std::clamp(kSplitElements / depth, kSplitBlockRows, std::min(kMostBlockRows, each))
            : std::clamp(kBlockElements / depth, kBlockRows, kMostBlockRows);
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
  const bool keeps = !split || !by_panels || matrix.depth * matrix.width < kMostKeptParts;
  const Tensor panels = keeps ? kept_weight(weight, transposed, dtype) : Tensor();
  MatmulParams p = {a.data,
                    panels.defined() ? panels.const_data_ptr() : nullptr,
                    matrix,
                    b->defined() ? b->const_data_ptr() : nullptr,
                    c->defined() ? c->const_data_ptr() : nullptr,
                    out,
                    a.stride,
                    out_stride,
                    add};
  const int64_t width = panels_of(dtype, matrix.width), tasks = by_panels ? width : blocks;
  const Scratch packed(
      panels.defined() || by_panels ? 0 : isa.packed_bytes(dtype, matrix.depth, matrix.width));
  if (!panels.defined() && !by_panels) {
    if (matrix.depth > 0) pack(matrix, dtype, packed.data());
    p.panels = packed.data();
  }
  const int64_t parts = parts_of(tasks);
  const int64_t rows = by_panels ? a.rows : block;
  const int64_t bytes =
      aligned(split || weight.element_size() == 2 ? rows * isa.row_bytes(dtype, matrix.depth) : 0) +
      aligned(p.panels ? 0 : isa.packed_bytes(dtype, matrix.depth, isa.panel_columns(dtype)));
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

// Of elements of so many bytes; those of the result have at least four.
void outer_sums(const OuterParams& p, at::ScalarType scalar, int64_t element) {
  const Kernels& isa = kernels();
  const DType dtype = product_type(parse_dtype(scalar), p.n, p.m, p.width);
  // Threads share the rows of the result, each packing all of a; of few rows, the columns.
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t tiles = isa.outer_tiles(dtype, p.m), panels = panels_of(dtype, p.width);
  const bool by_columns = tiles < threads && panels > tiles;
  const int64_t tasks = by_columns ? panels : tiles, columns = isa.panel_columns(dtype);
  const double flops = 2.0 * p.n * p.m * p.width;
  const int64_t parts = std::clamp<int64_t>(tasks / product_grain(tasks, flops), 1, threads);
  // In one allocation of this thread's: what others allocate, their heaps keep.
  const int64_t bytes = aligned(isa.outer_bytes(dtype, p.n, p.m, p.width));
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
  const int64_t grain = std::max<int64_t>(1, kElementsPerPackTask * panels / elements);
  for_each_range(panels, grain, [&](int64_t first, int64_t last) {
    isa.column_sums(dtype, v.data, v.rows, v.stride, width, first, last, out);
  });
}

namespace {

// The rows of a scan in parts, and where the states of each part's groups lie.
class Parts {
 public:
  Parts(const ScanParams& p, std::vector<int64_t> bounds, int64_t begin)
      : bounds_(std::move(bounds)) {
    begin += kApart;
    for (int64_t i = 0; i < count(); ++i) {
      const int64_t rows = bounds_[i + 1] - bounds_[i];
      bytes_.push_back(aligned(2 * rows * kernels().row_bytes(p.dtype, p.hidden)) + kApart);
      at_.push_back(begin);
      begin += p.groups * bytes_.back();
    }
    end_ = begin;
  }

  int64_t count() const { return static_cast<int64_t>(bounds_.size()) - 1; }
  int64_t end() const { return end_; }  // of the memory, in bytes
  void lie_in(uint8_t* memory) { memory_ = memory; }

  // `groups` groups of part i.
  Part of(int64_t group, int64_t groups, int64_t i) const {
    return {group,    groups, bounds_[i], bounds_[i + 1], memory_ + at_[i] + group * bytes_[i],
            bytes_[i]};
  }

 private:
  std::vector<int64_t> bounds_, bytes_, at_;
  int64_t end_ = 0;
  uint8_t* memory_ = nullptr;
};

void pack_layer_input(const ScanParams& p, const LayerInput& input, int64_t group, uint8_t* to) {
  const Tensor& w = input.weight[group];
  InputWeights packed = {
      {w.const_data_ptr(), w.stride(1), w.stride(0), p.features, p.hidden}, nullptr, nullptr};
  c10::MaybeOwned<Tensor> bias_ih, bias_hh;  // alive while they are read
  if (!input.bias_ih.empty()) {
    bias_ih = input.bias_ih[group].expect_contiguous();
    bias_hh = input.bias_hh[group].expect_contiguous();
    packed.bias_ih = bias_ih->const_data_ptr();
    packed.bias_hh = bias_hh->const_data_ptr();
  }
  kernels().pack_input(p.dtype, packed, to);
}

// One step, whose matrices are packed panel by panel as they are used, but for those that are kept.
void run_step(const ScanParams& p, const Parts& parts, at::TensorList weight, bool transposed,
              const std::vector<Tensor>& kept) {
  const Kernels& isa = kernels();
  const double flops = 2.0 * p.batch * p.hidden * p.hidden / panels_of(p.dtype, p.hidden);
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kFlopsPerThread / flops));
  for (int64_t g = 0; g < p.groups; ++g) {
    const Part part = parts.of(g, 1, 0);
    isa.start(p, part);
    for_each_panel(view_of(weight[g], transposed), p.dtype, kept[g], grain,
                   [&](int64_t i, int64_t column, int64_t, const void* panel) {
                     // Where the first panel would be.
                     const void* first = static_cast<const uint8_t*>(panel) -
                                         isa.packed_bytes(p.dtype, p.hidden, column);
                     const std::vector<const void*> of_group(p.groups, first);
                     ScanParams one = p;
                     one.panels = of_group.data();
                     OnePanel member(i);
                     isa.scan(one, part, &member);
                   });
  }
}

// Of every group the columns are shared by `members` threads.
void run_teams(const ScanParams& p, const Parts& parts, int64_t members) {
  const Kernels& isa = kernels();
  std::vector<Team> teams;
  for (int64_t g = 0; g < p.groups; ++g) {
    isa.start(p, parts.of(g, 1, 0));
    teams.emplace_back(members, panels_of(p.dtype, p.hidden), 2.0 * p.batch * p.hidden * p.hidden);
  }
  at::parallel_for(0, p.groups * members, 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t g = begin / members, first = begin % members;
      const int64_t last = std::min(members, first + end - begin);
      TeamMember member(teams[g], first, last);
      if (member.arrived()) isa.scan(p, parts.of(g, 1, 0), &member);
      begin += last - first;
    }
  });
}

// Each part of each group by one thread alone; of small matrices, several groups side by side.
// prepare(group) comes before a group's first part, in the thread that runs all of them.
template <class Prepare>
void run_parts(const ScanParams& p, const Parts& parts, int64_t threads, int64_t matrix_bytes,
               const Prepare& prepare) {
  const Kernels& isa = kernels();
  const int64_t tasks = p.groups * parts.count();
  const int64_t most = std::clamp<int64_t>(kSideBySide / matrix_bytes, 1, kMostGroups);
  for_each_range(tasks, (tasks + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t group = begin % p.groups;
      const int64_t groups = std::min({most, p.groups - group, end - begin});
      const Part part = parts.of(group, groups, begin / p.groups);
      for (int64_t g = group; g < group + groups; ++g) prepare(g);
      if (part.begin < part.end) {
        isa.start(p, part);
        isa.scan(p, part, nullptr);
      }
      begin += groups;
    }
  });
}

}  // namespace

int64_t scan_threads(const Steps& steps, int64_t groups, int64_t hidden) {
  const double flops = 2.0 * steps.rows * groups * hidden * hidden;
  // A step takes its time however few its multiply-adds are, so groups are shared out sooner.
  const auto waits = static_cast<int64_t>(kStepFlops * steps.count * groups / kFlopsPerThread);
  return std::clamp<int64_t>(
      std::max(static_cast<int64_t>(flops / kFlopsPerThread), std::min(groups, waits)), 1,
      at::get_num_threads());
}

void run_scan(ScanParams p, const Steps& steps, at::TensorList weight, bool transposed,
              const LayerInput* input, const std::function<void(int64_t)>& before) {
  p.steps = steps.count;
  p.batch = steps.batch;
  p.batch_sizes = steps.packed() ? steps.sizes.data() : nullptr;
  p.offsets = steps.packed() ? steps.offsets.data() : nullptr;
  if (steps.rows == 0 || p.hidden == 0) return;

  const Kernels& isa = kernels();
  // Each matrix meets its states once, or never. Nothing comes to a backward scan from beyond the
  // last step; what comes to another is zero if there is no h0, and 0 * W is zero if W is finite.
  const bool once = steps.count == 1;
  p.from_zero = p.from_zero || p.recurrence == Recurrence::kBackward ||
                (once && !p.initial && all_finite(weight));
  const bool never = once && p.from_zero;
  if (!once && isa.splits && p.dtype == DType::kFloat && steps.rows >= kSplitSteps &&
      steps.batch >= kSplitBatch && p.hidden >= kSplitHidden) {
    p.dtype = DType::kSplit;
  }

  const int64_t threads = scan_threads(steps, p.groups, p.hidden);
  const int64_t each = (threads + p.groups - 1) / p.groups;
  // Threads own ranges of rows of one group for all steps, and never meet; or, of few rows, they
  // own ranges of columns.
  const int64_t members = std::min(each, panels_of(p.dtype, p.hidden));
  const int64_t matrix_bytes = aligned(isa.packed_bytes(p.dtype, p.hidden, p.hidden));
  const int64_t team_rows = matrix_bytes > kLargeMatrix ? kTeamRowsOfLarge : kTeamRows;
  const bool share_columns = members > 1 && steps.batch <= team_rows * members && !once &&
                             steps.batch * p.hidden * p.hidden >= kTeamWork &&
                             !at::in_parallel_region();
  const bool whole = share_columns || (once && !never);

  // In one allocation: the packed matrices, but for those that are kept or not wanted, the packed
  // input weights, the states.
  std::vector<Tensor> kept;
  int64_t input_at = 0;
  for (const Tensor& w : weight) {
    // For one step, to see that a copy is still the weight takes as long as to do without; but not
    // of bytes, which are slow to pack.
    const bool search = !once || p.dtype == DType::kInt8;
    kept.push_back(search ? kept_weight(w, transposed, p.dtype) : Tensor());
    if (!kept.back().defined() && !once) input_at += matrix_bytes;
  }
  const int64_t input_bytes = input ? isa.input_bytes(p.dtype, p.hidden, p.features) : 0;
  Parts parts(p, steps.split(whole ? 1 : std::clamp<int64_t>(each, 1, steps.batch)),
              input_at + aligned(p.groups * input_bytes));
  const Scratch memory(parts.end());
  uint8_t* const base = memory.data();
  parts.lie_in(base);

  std::vector<const void*> matrices(p.groups, nullptr);
  std::vector<MatrixView> views;
  uint8_t* matrix = base;
  for (int64_t g = 0; g < p.groups; ++g) {
    views.push_back(view_of(weight[g], transposed));
    if (kept[g].defined()) {
      matrices[g] = kept[g].const_data_ptr();
    } else if (!once) {
      matrices[g] = matrix;
      matrix += matrix_bytes;
    }
  }
  p.panels = matrices.data();
  p.matrices = views.data();
  p.input_panels = base + input_at;
  const auto pack_group = [&](int64_t g) {
    if (before) before(g);
    if (!kept[g].defined() && !once) {
      pack(views[g], p.dtype, const_cast<void*>(matrices[g]));
    }
    if (input) pack_layer_input(p, *input, g, base + input_at + g * input_bytes);
  };
  // Where one thread runs all of a group, it packs too, into its own cache.
  const bool packs_itself = parts.count() == 1 && !whole;
  for (int64_t g = 0; g < p.groups && !packs_itself; ++g) pack_group(g);

  if (once && !never) {
    run_step(p, parts, weight, transposed, kept);
  } else if (share_columns) {
    run_teams(p, parts, members);
  } else {
    run_parts(p, parts, threads, matrix_bytes, [&](int64_t g) {
      if (packs_itself) pack_group(g);
    });
  }
}

}  // namespace rnnkern::cpu
