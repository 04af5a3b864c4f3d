// Runs the CUDA kernels under the simulator over a table of shapes, against the recurrence in
// double precision:
//
//   kernels [FAMILY] [SEEDS]     FAMILY: warp, block, cluster, grid or fma; all by default
//
// Compiled with RNNKERN_FEW, a bit for each family (Regime): a few kernels of those, up to the
// first failure (for test_cuda_mutants.py).
//
// A line for each kernel and shape: the relative error, and OK or what went wrong. Outputs start as
// NaNs, which is what must be left wherever nothing belongs, and every access to memory is checked
// against what the scan may read and write.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "block.cuh"
#include "cluster.cuh"
#include "fma.cuh"
#include "grid.cuh"
#include "warp.cuh"

namespace rnnkern::cuda {
namespace {

// ---- the kernels ----

template <class Element>
constexpr Precision kPrecision = Precision::kBFloat16;
template <>
constexpr Precision kPrecision<Half> = Precision::kHalf;
template <>
constexpr Precision kPrecision<Tf32> = Precision::kTf32;
template <>
constexpr Precision kPrecision<Tf32x3> = Precision::kTf32x3;

template <class Epilogue>
constexpr Recurrence kRecurrence = Recurrence::kLinear;
template <class F>
constexpr Recurrence kRecurrence<Forward<F>> = Recurrence::kForward;
template <class F>
constexpr Recurrence kRecurrence<Backward<F>> = Recurrence::kBackward;
template <class F>
constexpr Recurrence kRecurrence<Layer<F>> = Recurrence::kLayer;

template <class Element>
using Any = Chosen<DeviceMath<Element::kApproximate>>;

template <class Element, int hidden, class Epilogue>
using Cluster = ClusterScan<Element, hidden, 8, Epilogue>;
template <class Element, int hidden, class Epilogue>
using ClusterWide = ClusterScan<Element, hidden, 16, Epilogue>;
template <class Element, int hidden, class Epilogue>
using ClusterWgmma2 = ClusterScan<Element, hidden, 16, Epilogue, 2>;
template <class Element, int hidden, class Epilogue>
using ClusterWgmma4 = ClusterScan<Element, hidden, 32, Epilogue, 4>;
template <class Element, int hidden, class Epilogue>
using ClusterSpilled = ClusterScan<Element, hidden, 8, Epilogue, 0, 4>;
template <class Element, int hidden, class Epilogue>
using Grid = GridScan<Element, hidden, 8, Epilogue>;
template <class Element, int hidden, class Epilogue>
using GridWide = GridScan<Element, hidden, 16, Epilogue, 32, 2>;

#ifdef RNNKERN_FEW
constexpr unsigned kCompiled = RNNKERN_FEW;
#else
constexpr unsigned kCompiled = ~0u;
#endif

template <template <class, int, class> class Template, class Element, int hidden, class Epilogue>
void add(std::vector<Kernel>& kernels) {
  using K = Template<Element, hidden, Epilogue>;
  if constexpr (kCompiled >> int(K::kRegime) & 1) {
    kernels.push_back({K::kRegime, kPrecision<Element>, kRecurrence<Epilogue>, kAnyActivation,
                       K::kHidden, K::kRows, K::kUnits, K::kThreads, K::kShared, K::kCapability,
                       K::kHopper, [](Scan p) { K::run(p); }});
  }
}
template <template <class, int, class> class Template, class Element, int hidden>
void add_all(std::vector<Kernel>& kernels) {
  add<Template, Element, hidden, Forward<Any<Element>>>(kernels);
  add<Template, Element, hidden, Backward<Any<Element>>>(kernels);
  add<Template, Element, hidden, Linear>(kernels);
  constexpr Regime regime = Template<Element, hidden, Linear>::kRegime;
  if constexpr (!is_team(regime)) {
    add<Template, Element, hidden, Layer<Any<Element>>>(kernels);
  }
}

std::vector<Kernel> all_kernels() {
  std::vector<Kernel> kernels;
  add_all<WarpScan, BFloat16, 32>(kernels);
  add_all<FmaScan, Tf32x3, 64>(kernels);
  add_all<BlockScan, BFloat16, 64>(kernels);
  add_all<Cluster, BFloat16, 256>(kernels);
  add<ClusterWgmma2, BFloat16, 256, Forward<Any<BFloat16>>>(kernels);
  add_all<Grid, BFloat16, 512>(kernels);
#ifndef RNNKERN_FEW
  add_all<WarpScan, BFloat16, 16>(kernels);
  add_all<WarpScan, Half, 64>(kernels);
  add_all<WarpScan, Tf32, 16>(kernels);
  add_all<WarpScan, Tf32x3, 32>(kernels);
  add_all<FmaScan, Tf32x3, 16>(kernels);
  add_all<FmaScan, Tf32x3, 32>(kernels);
  add<FmaScan, Tf32x3, 96, Linear>(kernels);
  add<FmaScan, Tf32x3, 128, Backward<Any<Tf32x3>>>(kernels);
  add<FmaScan, Tf32x3, 192, Layer<Any<Tf32x3>>>(kernels);
  add<FmaScan, Tf32x3, 192, Backward<Any<Tf32x3>>>(kernels);
  add_all<BlockScan, Half, 128>(kernels);
  add<BlockScan, BFloat16, 256, Backward<Any<BFloat16>>>(kernels);
  add<BlockScan, Half, 256, Layer<Any<Half>>>(kernels);
  add_all<BlockScan, Tf32, 64>(kernels);
  add_all<BlockScan, Tf32x3, 128>(kernels);
  add_all<Cluster, Tf32x3, 128>(kernels);
  add<ClusterWide, Half, 256, Backward<Any<Half>>>(kernels);
  add<ClusterWgmma4, Half, 256, Backward<Any<Half>>>(kernels);
  add<ClusterSpilled, Tf32, 256, Forward<Any<Tf32>>>(kernels);
  add<GridWide, Tf32x3, 512, Backward<Any<Tf32x3>>>(kernels);
#endif
  return kernels;
}

// ---- the shapes ----

struct Shape {
  const char* name;
  int64_t steps;
  int batch;  // of a kernel's tile: + tiles * tile_rows
  int tiles;  // whole ones
  int less;   // units than the kernel has room for, in 16-byte pieces of a row
  int features, groups;
  uint32_t reverse;
  bool packed, input, initial, entry, last;
  int tile_rows;         // 0: the kernel's
  bool special = false;  // an infinity and a NaN among the input, or in x
};

constexpr Shape kShapes[] = {
    //                T  B   tiles less I G reverse packed input initial entry last
    {"ragged tile", 9, 3, 1, 0, 3, 1, 0, false, true, true, true, true, 0},
    {"no step", 0, 3, 0, 0, 2, 1, 0, false, true, true, true, true, 0},
    {"no step, packed", 0, 3, 0, 1, 1, 1, 1, true, true, false, true, true, 0},
    {"one step, one row", 1, 1, 0, 0, 1, 1, 0, false, true, false, false, false, 0},
    {"two steps back", 2, 0, 1, 1, 4, 1, 1, false, true, true, true, true, 0},
    {"groups both ways", 5, 2, 1, 2, 2, 3, 5, false, true, true, true, true, 0},
    {"packed both ways", 9, 5, 1, 1, 3, 2, 2, true, true, true, true, true, 0},
    {"packed, no input", 6, 7, 0, 3, 4, 2, 1, true, false, false, true, true, 0},
    {"small tiles", 40, 3, 0, 1, 1, 1, 0, false, true, true, false, true, 2},
    {"NaN and infinity", 4, 3, 0, 1, 3, 2, 2, true, true, true, true, true, 0, true},
    {"single rows", 7, 3, 0, 1, 3, 2, 2, true, true, true, true, true, 1},
};

// ---- a case ----

// Elements that are to be read, or to be written; as doubles, and as the kernels find them.
class Buffer {
 public:
  Buffer(Precision precision, size_t size)
      : precision_(precision), bytes_(size * element_bytes(precision) + 16, 0xff) {}
  void* data() { return bytes_.data() + (-reinterpret_cast<uintptr_t>(bytes_.data()) & 15); }
  size_t size() const { return (bytes_.size() - 16) / element_bytes(precision_); }
  simulator::Memory memory(bool writable) { return {data(), bytes_.size() - 16, writable}; }
  double operator[](size_t i) {
    if (element_bytes(precision_) == 4) return static_cast<float*>(data())[i];
    const uint16_t v = static_cast<uint16_t*>(data())[i];
    return precision_ == Precision::kHalf ? Half::value(v) : BFloat16::value(v);
  }
  void set(size_t i, double v) {
    const float f = static_cast<float>(v);
    if (element_bytes(precision_) == 4) {
      static_cast<float*>(data())[i] = f;
    } else {
      static_cast<uint16_t*>(data())[i] =
          precision_ == Precision::kHalf ? Half::round(f) : BFloat16::round(f);
    }
  }
  void poison() { std::fill(bytes_.begin(), bytes_.end(), 0xff); }
  bool poisoned(size_t i) const {
    auto* self = const_cast<Buffer*>(this);
    const auto* at =
        static_cast<const unsigned char*>(self->data()) + i * element_bytes(precision_);
    return std::all_of(at, at + element_bytes(precision_), [](auto c) { return c == 0xff; });
  }

 private:
  Precision precision_;
  std::vector<unsigned char> bytes_;
};

double as_stored(Precision precision, double v) {
  const float f = static_cast<float>(v);
  if (precision == Precision::kBFloat16) return BFloat16::value(BFloat16::round(f));
  if (precision == Precision::kHalf) return Half::value(Half::round(f));
  return f;
}
double as_multiplied(Precision precision, double v) {
  if (precision != Precision::kTf32) return v;
  return number(Tf32::operand(bits(static_cast<float>(v))));
}

double f(Activation activation, double a) {
  switch (activation) {
    case Activation::kTanh:
      return std::tanh(a);
    case Activation::kRelu:
      return a <= 0 ? 0 : a;
    case Activation::kSigmoid:
      return 1 / (1 + std::exp(-a));
    case Activation::kSoftplus:
      return std::max(a, 0.0) + std::log1p(std::exp(-std::fabs(a)));
    case Activation::kIdentity:
      break;
  }
  return a;
}
double df(Activation activation, double h) {
  switch (activation) {
    case Activation::kTanh:
      return 1 - h * h;
    case Activation::kRelu:
      return h <= 0 ? 0 : 1;
    case Activation::kSigmoid:
      return h * (1 - h);
    case Activation::kSoftplus:
      return -std::expm1(-h);
    case Activation::kIdentity:
      break;
  }
  return 1;
}

// The reference rounds as the kernels do, at the same places, so that what is left is the rounding
// of what is written, and of sums in float32, which now and then makes a state round the other way.
double tolerance(Precision precision) {
  switch (precision) {
    case Precision::kBFloat16:
      return 3e-3;
    case Precision::kHalf:
      return 4e-4;
    case Precision::kTf32:
      return 1e-4;
    case Precision::kTf32x3:
      break;
  }
  return 1e-6;
}

class Case {
 public:
  Case(const Kernel& kernel, const Shape& shape, Activation activation)
      : kernel_(kernel),
        shape_(shape),
        activation_(activation),
        tile_rows_(shape.tile_rows ? shape.tile_rows : kernel.rows),
        batch_(shape.batch + shape.tiles * tile_rows_),
        hidden_(units(kernel, shape.less)),
        stride_(static_cast<int64_t>(shape.groups + shape.less) * hidden_),
        rows_(count_rows()),
        layer_(kernel.recurrence == Recurrence::kLayer),
        input_(kernel.precision, rows_ * (layer_ ? shape.features : stride_)),
        aux_(kernel.precision, rows_ * stride_),
        initial_(kernel.precision, static_cast<size_t>(shape.groups) * batch_ * hidden_),
        entry_(kernel.precision, initial_.size()),
        output_(kernel.precision, rows_ * stride_),
        last_(kernel.precision, initial_.size()),
        weight_(kernel.precision, static_cast<size_t>(shape.groups) * hidden_ * hidden_),
        weight_ih_(kernel.precision, static_cast<size_t>(shape.groups) * hidden_ * shape.features),
        bias_ih_(kernel.precision, static_cast<size_t>(shape.groups) * hidden_),
        bias_hh_(kernel.precision, bias_ih_.size()) {
    simulator::Random random(7);
    const auto uniform = [&] { return (random() >> 8) * (2.0 / (1 << 24)) - 1; };
    // Of a group's columns; the rest must not matter.
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t j = 0; j < shape.groups * hidden_; ++j) {
        if (!layer_) input_.set(i * stride_ + j, uniform());
        aux_.set(i * stride_ + j, kernel.recurrence == Recurrence::kBackward
                                      ? f(activation, 2 * uniform())
                                      : uniform());
      }
    }
    for (size_t i = 0; i < initial_.size(); ++i) {
      initial_.set(i, uniform());
      entry_.set(i, uniform());
    }
    for (size_t i = 0; i < weight_.size(); ++i) {
      weight_.set(i, uniform() * std::sqrt(2.0 / hidden_));
    }
    if (layer_) {
      for (Buffer* each : {&input_, &weight_ih_, &bias_ih_, &bias_hh_}) {
        for (size_t i = 0; i < each->size(); ++i) each->set(i, uniform() / 2);
      }
    }
    if (shape.special) {
      const size_t row = layer_ ? shape.features : stride_;
      // Of x at the end and the beginning of rows, beside others.
      input_.set(row + !layer_, std::numeric_limits<double>::infinity());
      input_.set(2 * row + (layer_ ? row - 1 : hidden_ + 3), std::nan(""));
    }
    expect();
  }

  std::string name() const {
    static const char* const kRegimes[] = {"warp", "block", "cluster", "grid", "fma"};
    static const char* const kPrecisions[] = {"bf16", "fp16", "tf32", "tf32x3"};
    static const char* const kRecurrences[] = {"forward", "backward", "linear", "layer"};
    char text[200];
    std::snprintf(
        text, sizeof text, "%-7s %-6s H%-4d %-8s %-8s | %-18s T%d B%d H%d G%d",
        kRegimes[int(kernel_.regime)], kPrecisions[int(kernel_.precision)], kernel_.hidden,
        kRecurrences[int(kernel_.recurrence)],
        kernel_.recurrence == Recurrence::kLinear ? "-" : kActivationNames[int(activation_)],
        shape_.name, int(shape_.steps), batch_, hidden_, shape_.groups);
    return text;
  }

  // Under a schedule: what went wrong, or "".
  std::string run(unsigned seed) {
    output_.poison();
    last_.poison();
    const bool forward = kernel_.recurrence != Recurrence::kBackward;
    Scan p = {};
    p.recurrence = kernel_.recurrence;
    p.activation = activation_;
    p.steps = shape_.steps;
    p.batch = batch_;
    p.hidden = hidden_;
    p.groups = shape_.groups;
    p.tile_rows = tile_rows_;
    p.row_stride = stride_;
    if (has_input()) p.input = input_.data();
    if (kernel_.recurrence == Recurrence::kBackward || kernel_.recurrence == Recurrence::kLinear) {
      p.aux = aux_.data();
    }
    if (has_initial()) p.initial = initial_.data();
    if (has_entry()) p.entry = entry_.data();
    p.output = output_.data();
    if (shape_.last) p.last = last_.data();
    p.weight = {weight_.data(), static_cast<int64_t>(hidden_) * hidden_, forward ? hidden_ : 1,
                forward ? 1 : hidden_};
    if (layer_) {
      const int features = shape_.features;
      p.features = features;
      p.weight_ih = {weight_ih_.data(), hidden_ * features, features, 1};
      if (has_biases()) p.bias_ih = {bias_ih_.data(), hidden_, 1, 0};
      if (has_biases()) p.bias_hh = {bias_hh_.data(), hidden_, 1, 0};
    }
    if (shape_.packed) p.table = table_.data();
    p.reverse[0] = shape_.reverse;

    simulator::Launch launch;
    const int tiles = (batch_ + tile_rows_ - 1) / tile_rows_;
    const int team = blocks_of_tile(kernel_.regime, hidden_, kernel_.units);
    launch.grid_x = tiles * team;
    launch.grid_y = shape_.groups;
    if (kernel_.regime == Regime::kCluster) launch.cluster = team;
    if (kernel_.regime == Regime::kGrid) {
      launch.cooperative = true;
      launch.grid_x = std::min(2, tiles) * team;
      launch.grid_y = 1;
    }
    launch.threads = kernel_.threads;
    launch.shared = kernel_.shared;
    launch.memory = {input_.memory(false),
                     aux_.memory(false),
                     initial_.memory(false),
                     entry_.memory(false),
                     output_.memory(true),
                     last_.memory(true),
                     weight_.memory(false),
                     weight_ih_.memory(false),
                     bias_ih_.memory(false),
                     bias_hh_.memory(false),
                     {table_.data(), table_.size() * 8, false}};
    const std::string wrong = simulator::simulate(launch, seed, [&] { kernel_.function(p); });
    return wrong.empty() ? compare() : wrong;
  }

  double worst() const { return worst_; }

 private:
  bool has_input() const { return shape_.input || kernel_.recurrence != Recurrence::kBackward; }
  bool has_initial() const { return shape_.initial && kernel_.recurrence != Recurrence::kBackward; }
  bool has_biases() const { return shape_.entry; }
  bool has_entry() const { return shape_.entry && kernel_.recurrence == Recurrence::kBackward; }
  int size(int64_t t) const { return shape_.packed ? static_cast<int>(table_[t]) : batch_; }
  int64_t first(int64_t t) const { return shape_.packed ? table_[shape_.steps + t] : t * batch_; }

  static int units(const Kernel& kernel, int less) {
    const int piece = 16 / element_bytes(kernel.precision);
    // A grid of so many blocks takes its time: once in its full size is enough.
    const int most = kernel.regime == Regime::kGrid && less ? kernel.hidden / 4 : kernel.hidden;
    return std::max(most - less * piece, piece);
  }

  // A packed batch's sizes fall from batch to 1, the last steps' being equal.
  int64_t count_rows() {
    const int64_t steps = shape_.steps;
    if (!shape_.packed) return steps * batch_;
    table_.resize(2 * steps);
    int64_t rows = 0;
    for (int64_t t = 0; t < steps; ++t) {
      table_[t] = std::max<int64_t>(1, batch_ - t * (batch_ + 2) / steps);
      table_[steps + t] = rows;
      rows += table_[t];
    }
    return rows;
  }

  void expect() {
    const Precision precision = kernel_.precision;
    const bool forward = kernel_.recurrence != Recurrence::kBackward;
    expected_.assign(output_.size(), 0);
    expected_last_.assign(last_.size(), 0);
    std::vector<double> matrix(static_cast<size_t>(hidden_) * hidden_), next(hidden_);
    for (int g = 0; g < shape_.groups; ++g) {
      for (int n = 0; n < hidden_; ++n) {
        for (int k = 0; k < hidden_; ++k) {
          const size_t at = forward ? n * hidden_ + k : k * hidden_ + n;
          matrix[n * hidden_ + k] = as_multiplied(precision, weight_[g * matrix.size() + at]);
        }
      }
      for (int b = 0; b < batch_; ++b) {
        const size_t at_state = (static_cast<size_t>(g) * batch_ + b) * hidden_;
        std::vector<double> state(hidden_);
        if (has_initial()) {
          for (int n = 0; n < hidden_; ++n) state[n] = initial_[at_state + n];
        }
        bool enters = true;
        for (int64_t i = 0; i < shape_.steps; ++i) {
          const int64_t t = shape_.reverse >> g & 1 ? shape_.steps - 1 - i : i;
          if (b >= size(t)) continue;
          const size_t at = (first(t) + b) * stride_ + g * hidden_;
          for (double& s : state) s = as_multiplied(precision, s);
          for (int n = 0; n < hidden_; ++n) {
            double sum = 0;
            for (int k = 0; k < hidden_; ++k) sum += matrix[n * hidden_ + k] * state[k];
            const double in = layer_        ? product(g, first(t) + b, n)
                              : has_input() ? input_[at + n]
                                            : 0;
            if (layer_ || kernel_.recurrence == Recurrence::kForward) {
              next[n] = f(activation_, sum + in);
            } else if (kernel_.recurrence == Recurrence::kBackward) {
              const double entry = has_entry() && enters ? entry_[at_state + n] : 0;
              next[n] = df(activation_, aux_[at + n]) * (sum + in + entry);
            } else {
              next[n] = in + aux_[at + n] * sum;
            }
            expected_[at + n] = next[n];
          }
          enters = false;
          for (int n = 0; n < hidden_; ++n) state[n] = as_stored(precision, next[n]);
        }
        for (int n = 0; n < hidden_; ++n) expected_last_[at_state + n] = state[n];
      }
    }
  }

  // kLayer's input of a unit.
  double product(int g, int64_t row, int n) {
    const int features = shape_.features, unit = g * hidden_ + n;
    double sum = has_biases() ? bias_ih_[unit] + bias_hh_[unit] : 0;
    for (int k = 0; k < features; ++k) {
      sum += as_multiplied(kernel_.precision, weight_ih_[unit * features + k]) *
             as_multiplied(kernel_.precision, input_[row * features + k]);
    }
    return sum;
  }

  std::string compare() {
    double error = 0, norm = 0;
    const auto add = [&](double got, double wanted) {
      // An infinity or a NaN must be one; both are infinite when rounded to the same.
      if (!std::isfinite(wanted)) return std::isnan(wanted) ? std::isnan(got) : got == wanted;
      error += (got - wanted) * (got - wanted);
      norm += wanted * wanted;
      return std::isfinite(got);
    };
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t j = 0; j < stride_; ++j) {
        const size_t i = row * stride_ + j;
        const bool right =
            j < shape_.groups * hidden_ ? add(output_[i], expected_[i]) : output_.poisoned(i);
        if (!right) {
          return "output " + std::to_string(row) + ", " + std::to_string(j) + " is " +
                 std::to_string(output_[i]) + ", not " + std::to_string(expected_[i]);
        }
      }
    }
    for (size_t i = 0; i < last_.size(); ++i) {
      const bool right = shape_.last ? add(last_[i], expected_last_[i]) : last_.poisoned(i);
      if (!right) {
        return "last " + std::to_string(i) + " is " + std::to_string(last_[i]) + ", not " +
               std::to_string(expected_last_[i]);
      }
    }
    const double relative = norm > 0 ? std::sqrt(error / norm) : error;
    worst_ = std::max(worst_, relative);
    return relative <= tolerance(kernel_.precision) ? "" : "inaccurate";
  }

  const Kernel& kernel_;
  const Shape& shape_;
  const Activation activation_;
  const int tile_rows_, batch_, hidden_;
  const int64_t stride_;
  std::vector<int64_t> table_;
  const int64_t rows_;
  const bool layer_;
  Buffer input_, aux_, initial_, entry_, output_, last_, weight_, weight_ih_, bias_ih_, bias_hh_;
  std::vector<double> expected_, expected_last_;
  double worst_ = 0;
};

int run(const std::string& family, unsigned seeds) {
  int failed = 0;
  for (const Kernel& kernel : all_kernels()) {
    static const char* const kFamilies[] = {"warp", "block", "cluster", "grid", "fma"};
    if (!family.empty() && family != kFamilies[int(kernel.regime)]) continue;
    for (const Shape& shape : kShapes) {
      Case one(kernel, shape, static_cast<Activation>((&shape - kShapes) % 5));
      std::string wrong;
      for (unsigned seed = 0; seed < seeds && wrong.empty(); ++seed) wrong = one.run(seed);
      std::printf("%s | %.1e %s\n", one.name().c_str(), one.worst(),
                  wrong.empty() ? "OK" : ("FAIL: " + wrong).c_str());
      std::fflush(stdout);
      failed += !wrong.empty();
#ifdef RNNKERN_FEW
      if (failed) return 1;  // more than that is not asked
#endif
    }
  }
  std::printf("%d failed\n", failed);
  return failed != 0;
}

}  // namespace
}  // namespace rnnkern::cuda

int main(int argc, char** argv) {
  return rnnkern::cuda::run(argc > 1 ? argv[1] : "", argc > 2 ? std::atoi(argv[2]) : 3);
}
