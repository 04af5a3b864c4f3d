// The kernels that are compiled. A hidden size that deserves a kernel of its own is a line here.
//
// A unit of compilation is one regime and precision (kernels.cu). Within it every kernel is
// compiled for each recurrence, those of one block for kLayer too, with any activation, and for the
// two most common by themselves.
#pragma once
#include <vector>

#include "block.cuh"
#include "cluster.cuh"
#include "fma.cuh"
#include "grid.cuh"
#include "launch.h"
#include "warp.cuh"

namespace rnnkern::cuda {

#ifdef RNNKERN_SIMULATE
template <class K>
void scan_kernel(Scan p) {
  K::run(p);
}
#else
template <class K>
__global__ void __launch_bounds__(K::kThreads, 1) scan_kernel(const __grid_constant__ Scan p) {
  // For architectures that have not its instructions, nothing is compiled; Kernel::runs_on says so.
#ifdef __CUDA_ARCH__
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr bool kHopper = true;
#else
  constexpr bool kHopper = false;
#endif
  if constexpr (__CUDA_ARCH__ >= 10 * K::kCapability && (kHopper || !K::kHopper)) K::run(p);
#endif
}
#endif

// ---- hidden sizes ----

template <class... Items>
struct List {};

template <class Element, int hidden>
struct Warp {
  template <class Epilogue>
  using Of = WarpScan<Element, hidden, Epilogue>;
};
template <class Element, int hidden>
struct Fma {
  template <class Epilogue>
  using Of = FmaScan<Element, hidden, Epilogue>;
};
template <class Element, int hidden>
struct Block {
  template <class Epilogue>
  using Of = BlockScan<Element, hidden, Epilogue>;
};
template <class Element, int hidden, int rows, int... how>
struct Cluster {
  template <class Epilogue>
  using Of = ClusterScan<Element, hidden, rows, Epilogue, how...>;
};
template <class Element, int hidden, int rows, int... how>
struct Grid {
  template <class Epilogue>
  using Of = GridScan<Element, hidden, rows, Epilogue, how...>;
};

template <Regime, class Element, int bytes = Element::kBytes>
struct Sizes;

#ifdef RNNKERN_SIMULATE  // the least that shows how a binding can go wrong
template <class E, int bytes>
struct Sizes<Regime::kWarp, E, bytes> : List<Warp<E, 32>> {};
template <class E, int bytes>
struct Sizes<Regime::kFma, E, bytes> : List<Fma<E, 64>> {};
template <class E, int bytes>
struct Sizes<Regime::kBlock, E, bytes> : List<Block<E, 64>> {};
template <class E, int bytes>
struct Sizes<Regime::kCluster, E, bytes> : List<Cluster<E, 256, 8>> {};
template <class E, int bytes>
struct Sizes<Regime::kGrid, E, bytes> : List<Grid<E, 512, 8>> {};
#else
// clang-format off
// hidden
template <class E, int bytes>
struct Sizes<Regime::kWarp, E, bytes> : List<
  Warp<E, 16>,
  Warp<E, 32>> {};
template <class E>
struct Sizes<Regime::kFma, E, 4> : List<
  Fma<E, 16>,
  Fma<E, 32>,
  Fma<E, 64>,
  Fma<E, 96>,
  Fma<E, 128>,
  Fma<E, 192>> {};
template <class E>
struct Sizes<Regime::kBlock, E, 2> : List<
  Block<E, 64>,
  Block<E, 96>,
  Block<E, 128>,
  Block<E, 192>,
  Block<E, 256>> {};
template <class E>
struct Sizes<Regime::kBlock, E, 4> : List<
  Block<E, 64>,
  Block<E, 96>,
  Block<E, 128>> {};

// hidden, rows; warpgroups of wgmma; products' steps whose weights are in registers.
template <class E>
struct Sizes<Regime::kCluster, E, 2> : List<
  Cluster<E, 256, 8>,
  Cluster<E, 512, 8>,
  Cluster<E, 512, 16, 2>,
  Cluster<E, 512, 32, 4>,
  Cluster<E, 768, 8>,
  Cluster<E, 768, 16, 2>,
  Cluster<E, 1024, 8>,
  Cluster<E, 1024, 16, 2>,
  Cluster<E, 1024, 32, 2>> {};
template <>
struct Sizes<Regime::kCluster, Tf32, 4> : List<
  Cluster<Tf32, 256, 8>,
  Cluster<Tf32, 256, 16>,
  Cluster<Tf32, 512, 8>,
  Cluster<Tf32, 512, 16>> {};
template <>
struct Sizes<Regime::kCluster, Tf32x3, 4> : List<
  Cluster<Tf32x3, 256, 8>,
  Cluster<Tf32x3, 256, 16>> {};

// hidden, rows; units of a block; products' steps whose weights are in registers.
template <class E>
struct Sizes<Regime::kGrid, E, 2> : List<
  Grid<E, 1024, 8>,
  Grid<E, 1024, 32>,
  Grid<E, 2048, 8>,
  Grid<E, 2048, 32>,
  Grid<E, 4096, 8, 32, 16>> {};
template <>
struct Sizes<Regime::kGrid, Tf32, 4> : List<
  Grid<Tf32, 512, 8>,
  Grid<Tf32, 1024, 8>,
  Grid<Tf32, 1024, 32>,
  Grid<Tf32, 2048, 8, 16, 28>,
  Grid<Tf32, 2048, 16, 16, 28>> {};
template <>
struct Sizes<Regime::kGrid, Tf32x3, 4> : List<
  Grid<Tf32x3, 512, 8>,
  Grid<Tf32x3, 512, 16>,
  Grid<Tf32x3, 1024, 8>,
  Grid<Tf32x3, 1024, 16>,
  Grid<Tf32x3, 2048, 8, 16, 12>> {};
// clang-format on
#endif

// ---- from these, the table ----

template <Precision>
struct ElementOf;
template <>
struct ElementOf<Precision::kBFloat16> {
  using Type = BFloat16;
};
template <>
struct ElementOf<Precision::kHalf> {
  using Type = Half;
};
template <>
struct ElementOf<Precision::kTf32> {
  using Type = Tf32;
};
template <>
struct ElementOf<Precision::kTf32x3> {
  using Type = Tf32x3;
};

// An epilogue, and what the launcher calls it.
template <class E, Recurrence recurrence, int activation>
struct Case {
  using Epilogue = E;
  static constexpr Recurrence kRecurrence = recurrence;
  static constexpr int kActivation = activation;
};

template <class Math>
using AnyActivation = List<Case<Forward<Chosen<Math>>, Recurrence::kForward, kAnyActivation>,
                           Case<Backward<Chosen<Math>>, Recurrence::kBackward, kAnyActivation>,
                           Case<Linear, Recurrence::kLinear, kAnyActivation>>;
template <template <class> class F, class Math, Activation activation>
using OneActivation =
    List<Case<Forward<Known<F<Math>>>, Recurrence::kForward, static_cast<int>(activation)>,
         Case<Backward<Known<F<Math>>>, Recurrence::kBackward, static_cast<int>(activation)>>;
// Larger scans take so long that a product before them does not count.
template <class Math>
using FewFeatures =
    List<Case<Layer<Known<Tanh<Math>>>, Recurrence::kLayer, static_cast<int>(Activation::kTanh)>,
         Case<Layer<Known<Relu<Math>>>, Recurrence::kLayer, static_cast<int>(Activation::kRelu)>,
         Case<Layer<Chosen<Math>>, Recurrence::kLayer, kAnyActivation>>;

template <Precision precision, class Size, class... Cases>
void add(std::vector<Kernel>& table, List<Cases...>) {
  const auto one = [&](auto which) {
    using Which = decltype(which);
    using K = typename Size::template Of<typename Which::Epilogue>;
    static_assert(K::kShared <= 227 * 1024, "more shared memory than a block can have");
    table.push_back({K::kRegime, precision, Which::kRecurrence, Which::kActivation, K::kHidden,
                     K::kRows, K::kUnits, K::kThreads, K::kShared, K::kCapability, K::kHopper,
                     &scan_kernel<K>});
  };
  (one(Cases{}), ...);
}

template <Regime regime, Precision precision, class... Items>
std::vector<Kernel> table_of(List<Items...>) {
  using Math = DeviceMath<ElementOf<precision>::Type::kApproximate>;
  std::vector<Kernel> table;
  (add<precision, Items>(table, OneActivation<Tanh, Math, Activation::kTanh>{}), ...);
  (add<precision, Items>(table, OneActivation<Relu, Math, Activation::kRelu>{}), ...);
  (add<precision, Items>(table, AnyActivation<Math>{}), ...);
  if constexpr (!is_team(regime)) {
    (add<precision, Items>(table, FewFeatures<Math>{}), ...);
  }
  return table;
}

template <Regime regime, Precision precision>
std::vector<Kernel> compiled() {
  return table_of<regime, precision>(Sizes<regime, typename ElementOf<precision>::Type>{});
}

}  // namespace rnnkern::cuda
