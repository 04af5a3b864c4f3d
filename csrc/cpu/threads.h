// Threads, and the memory that they work in.
#pragma once
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/GradMode.h>

#include <cstdint>
#ifdef __linux__
#include <unistd.h>
#endif

namespace rnnkern::cpu {

constexpr int64_t kElementsPerTask = 65536;  // that a task copies or adds up, at least

// at::parallel_for, but without its bookkeeping where there is nothing to share out; and with the
// caller's grad mode, by which kept_weight() goes.
template <class F>
void for_each_range(int64_t count, int64_t grain, const F& f) {
  if (count <= grain || at::get_num_threads() == 1) return f(0, count);
  const bool grad = at::GradMode::is_enabled();
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const at::AutoGradMode same(grad);
    f(begin, end);
  });
}

// Bytes of a core's first-level data cache or its second-level one; 32 KB and 1 MB where the system
// does not say.
inline int64_t cache_bytes(int level) {
  static const int64_t bytes[] = {
#ifdef _SC_LEVEL2_CACHE_SIZE
      sysconf(_SC_LEVEL1_DCACHE_SIZE) > 0 ? sysconf(_SC_LEVEL1_DCACHE_SIZE) : 32 << 10,
      sysconf(_SC_LEVEL2_CACHE_SIZE) > 0 ? sysconf(_SC_LEVEL2_CACHE_SIZE) : 1 << 20,
#else
      32 << 10,
      1 << 20,
#endif
  };
  return bytes[level - 1];
}

// What lies one after another in one allocation: the packed weights, the tasks' states.
inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

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
  static inline thread_local Small small_ = {};

  bool of_thread_;
  at::DataPtr memory_;
  uint8_t* data_;
};

}  // namespace rnnkern::cpu
