#include "packed.h"

#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <functional>
#include <iterator>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "threads.h"

namespace rnnkern::cpu {
namespace {

// Elements of a weight from which it pays to keep it packed: below, packing costs next to nothing.
constexpr int64_t kLeastKept = 256 * 256;
constexpr int64_t kBlock = 1 << 16;  // bytes

uint64_t hash_of(const at::Tensor& t) {
  const Kernels& isa = kernels();
  const auto* data = static_cast<const char*>(t.const_data_ptr());
  const int64_t bytes = static_cast<int64_t>(t.nbytes());
  std::vector<uint64_t> hashes((bytes + kBlock - 1) / kBlock);
  at::parallel_for(0, static_cast<int64_t>(hashes.size()), 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      hashes[i] = isa.hash(data + i * kBlock, std::min(kBlock, bytes - i * kBlock));
    }
  });
  return isa.hash(hashes.data(), static_cast<int64_t>(hashes.size() * sizeof(uint64_t)));
}

// Packed weights that outlive a call: without gradients a weight is most often the same in the next
// call, and packing W costs as much as many steps of one row (H 2048: 40 of them).
//
// A copy is kept from a weight's second call on, so that one which changes between calls (a
// checkpointed training step's) never has one, and as long as the weight lives. The copy serves
// while the version counter stands still and the numbers have the hash that they had: writes
// through .data do not count as versions, and reading W costs about what a step of one row does.
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

at::Tensor PackedWeights::find(const at::Tensor& weight, int64_t bytes, const Pack& pack) {
  auto* const key = weight.unsafeGetTensorImpl();
  const void* const data = weight.const_data_ptr();
  const uint32_t version = weight.is_inference() ? 0 : weight._version();
  at::Tensor packed;
  uint64_t hash = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(key);
    const bool known = found != entries_.end() && !found->second.weight.expired() &&
                       found->second.data == data && found->second.version == version;
    if (!known) {
      // Those that have died since go with this one's older state.
      for (auto it = entries_.begin(); it != entries_.end();) {
        it = it->first == key || it->second.weight.expired() ? entries_.erase(it) : std::next(it);
      }
      entries_.emplace(
          key, Entry{c10::weak_intrusive_ptr<c10::TensorImpl>(weight.getIntrusivePtr()), data,
                     version, 0, at::Tensor()});
      return at::Tensor();
    }
    packed = found->second.packed;
    hash = found->second.hash;
  }
  const uint64_t now = hash_of(weight);
  if (packed.defined() && now == hash && static_cast<int64_t>(packed.nbytes()) == bytes)
    return packed;
  packed = at::empty({bytes}, at::TensorOptions().dtype(at::kByte));
  pack(packed.mutable_data_ptr());
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = entries_.find(key);
  if (found != entries_.end() && found->second.data == data && found->second.version == version) {
    found->second.packed = packed;
    found->second.hash = now;
  }
  return packed;
}

}  // namespace

int64_t panels_of(DType dtype, int64_t width) {
  const int64_t columns = kernels().panel_columns(dtype);
  return (width + columns - 1) / columns;
}

void pack(const MatrixView& matrix, DType dtype, void* dst) {
  const Kernels& isa = kernels();
  const int64_t panels = panels_of(dtype, matrix.width);
  const int64_t grain =
      std::max<int64_t>(1, kElementsPerTask * panels / (matrix.depth * matrix.width));
  for_each_range(panels, grain,
                 [&](int64_t first, int64_t last) { isa.pack(dtype, matrix, first, last, dst); });
}

at::Tensor kept_weight(const at::Tensor& w, bool transposed, DType dtype) {
  const bool frozen = dtype == DType::kInt8 || !at::GradMode::is_enabled();
  if (transposed || !frozen || w.numel() < kLeastKept || !w.is_contiguous()) return at::Tensor();
  static auto* const kept = new PackedWeights;  // never destroyed: threads may outlive main()
  const MatrixView matrix = view_of(w, transposed);
  return kept->find(w, kernels().packed_bytes(dtype, matrix.depth, matrix.width),
                    [&](void* dst) { pack(matrix, dtype, dst); });
}

}  // namespace rnnkern::cpu
