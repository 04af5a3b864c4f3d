// Packed weights that outlive a call. Without gradients a weight is most often the same in the next
// call, and packing W costs as much as many steps of one row (H 2048: 40 of them).
//
// A copy is kept from a weight's second call on, so that one which changes between calls (a
// checkpointed training step's) never has one, and as long as the weight lives. The copy serves
// while the version counter stands still and the numbers have the hash that they had: writes
// through .data do not count as versions, and reading W costs about what a step of one row does.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <mutex>
#include <unordered_map>

namespace rnnkern::cpu {

class PackedWeights {
 public:
  // Fills `bytes` of memory.
  using Pack = std::function<void(void*)>;

  // The packed copy of a contiguous weight, made by `pack` if there is none; undefined at its first
  // sight.
  at::Tensor find(const at::Tensor& weight, int64_t bytes, const Pack& pack);

 private:
  struct Entry {
    c10::weak_intrusive_ptr<c10::TensorImpl> weight;
    const void* data;
    uint32_t version;
    uint64_t hash;
    at::Tensor packed;  // undefined at first
  };
  std::mutex mutex_;
  std::unordered_map<c10::TensorImpl*, Entry> entries_;
};

}  // namespace rnnkern::cpu
