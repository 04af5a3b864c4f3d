#include "runner.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "packed.h"
#include "team.h"
#include "threads.h"

namespace rnnkern::cpu {
namespace {

// Operations of a scan below which another thread does not pay, as of a product (products.cpp:
// kProductFlops). Eight groups of (B, T, I, H) = (1, 100, 1, 16) take 14 us either way between
// other calls, a training step 187 and 172.
constexpr double kFlopsPerThread = 1e6, kStepFlops = 2e3;
// Groups run side by side while their matrices fit the first-level cache together, and leave a
// quarter of it to the rows. A step of one of 8 groups of one row: H 16 9 ns, 20 one after another;
// H 32, of 32 KB in all, 24 and 28. Where two matrices fill all of the cache, 256 steps of both
// take 74 us, and 68 one after the other (H 64, on a Zen 4 with 32 KB).
int64_t side_by_side_bytes() { return cache_bytes(1) / 4 * 3; }
// Columns are shared, by threads that meet after every step, where there are at most so many rows a
// thread, and so many multiply-adds a step (an estimate). A matrix larger than a core's cache is
// worth it with many more rows: each thread then reads only its part of it. Forward on two threads
// of a Xeon with 2 MB each, columns shared / rows shared: (B, H) = (4, 512) 0.8, (8, 512) 1.04,
// (16, 512) 1.1, (8, 768) 0.84, (32, 768) 0.9, (16, 1024) 0.76, (32, 1024) 0.94, (64, 2048) 0.92.
constexpr int64_t kTeamRows = 2, kTeamRowsOfLarge = 32, kTeamWork = 65536, kLargeMatrix = 2 << 20;
// The least of a scan that AMX makes of float32's parts (DType::kSplit), which take time to make.
// AVX-512's time / AMX's on two threads, of so many rows and H, forward and backward: (16, 256)
// 0.96, 0.87; (32, 256) 1.02, 1.02; (128, 256) 1.11, 1.23; (16, 384) 1.1, 0.97; (128, 512) 1.31,
// 1.29.
constexpr int64_t kSplitBatch = 24, kSplitHidden = 256, kSplitSteps = 512;
// Bytes between a state and what another thread reads or writes: a processor fetches beyond what it
// reads, and so would take the state from its thread in every step. 1024 steps of two groups of one
// row, H 64, a thread each: 155 us without, 143 with 256 bytes before the states, 104 with 1024
// around each; one group alone takes 105 to 112.
constexpr int64_t kApart = 1024;

}  // namespace

c10::SmallVector<bool, kMostGroups> flag_array(Flags reverse, bool flipped) {
  c10::SmallVector<bool, kMostGroups> flags;
  for (const int64_t flag : reverse) flags.push_back((flag != 0) != flipped);
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

// False also where the sum of a finite matrix overflows.
bool all_finite(at::TensorList weight) {
  for (const Tensor& w : weight) {
    if (!std::isfinite(w.sum().item<double>())) return false;
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
  std::vector<int64_t> bounds_;
  c10::SmallVector<int64_t, 4> bytes_, at_;
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
              c10::ArrayRef<Tensor> kept) {
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
  const int64_t most = std::clamp<int64_t>(side_by_side_bytes() / matrix_bytes, 1, kMostGroups);
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
  // (A zero state of bytes is none: they are shifted, and what that adds is taken off the product.)
  const bool once = steps.count == 1;
  p.from_zero = p.from_zero || p.recurrence == Recurrence::kBackward ||
                (once && !p.initial && p.dtype != DType::kInt8 && all_finite(weight));
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
  c10::SmallVector<Tensor, kMostGroups> kept;
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

  c10::SmallVector<const void*, kMostGroups> matrices(p.groups, nullptr);
  c10::SmallVector<MatrixView, kMostGroups> views;
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
