#include "isa.h"

#include <ATen/Version.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

namespace rnnkern::cpu {
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
  __builtin_cpu_init();
  const bool avx512 = capability == "AVX512", avx2 = avx512 || capability == "AVX2";
  const bool bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  const auto add = [&](const Kernels& kernels, bool has) {
    if (has || kernels.emulated) all.push_back(&kernels);
  };
  add(kAvx2Kernels, avx2);
  add(kAvx512Kernels, avx512);
  add(kAvx512Bf16Kernels, bf16);
  add(kAmxKernels, bf16 && has_amx());
#endif
  return all;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = [] {
    const std::vector<const Kernels*> all = runnable();
    const char* asked = std::getenv("RNNKERN_CPU_CAPABILITY");
    if (!asked || !*asked) {
      return *std::find_if(all.rbegin(), all.rend(), [](auto* of) { return !of->emulated; });
    }
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

bool has_products(at::ScalarType dtype) {
  if (dtype == at::kFloat || dtype == at::kDouble) return true;
  // In 16 bits torch multiplies well only with the instructions for it: on a Zen 3, which has none,
  // the input products of bfloat16 of (64, 128, 512, 512) took 439 ms, and those of float32 32.
  static const bool slow[] = {!knows_bfloat16(), !knows_half()};
  return slow[dtype == at::kHalf] && kernels().has_products(parse_dtype(dtype));
}

}  // namespace rnnkern::cpu
