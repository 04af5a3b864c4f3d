#include "packed.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>

namespace rnnkern::cpu {
namespace {

constexpr int64_t kBlock = 1 << 16;  // bytes

// A hash of a block, in lanes so that the multiplications need not wait for each other. Each turns
// the high bits down, where the next one spreads them: plain hashes miss W.data.mul_(0.5), which
// takes the same from every word.
uint64_t block_hash(const char* data, int64_t bytes) {
  constexpr int lanes = 8;
  const auto mix = [](uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    return hash << 29 | hash >> 35;
  };
  uint64_t hashes[lanes] = {}, words[lanes];
  int64_t at = 0;
  for (; at + int64_t(sizeof words) <= bytes; at += sizeof words) {
    std::memcpy(words, data + at, sizeof words);
    for (int i = 0; i < lanes; ++i) hashes[i] = mix(hashes[i], words[i]);
  }
  uint64_t all = bytes;
  for (const uint64_t hash : hashes) all = mix(all, hash);
  for (; at < bytes; ++at) all = mix(all, static_cast<unsigned char>(data[at]));
  return all;
}

uint64_t hash_of(const at::Tensor& t) {
  const auto* data = static_cast<const char*>(t.const_data_ptr());
  const int64_t bytes = static_cast<int64_t>(t.nbytes());
  std::vector<uint64_t> hashes((bytes + kBlock - 1) / kBlock);
  at::parallel_for(0, static_cast<int64_t>(hashes.size()), 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      hashes[i] = block_hash(data + i * kBlock, std::min(kBlock, bytes - i * kBlock));
    }
  });
  return block_hash(reinterpret_cast<const char*>(hashes.data()), hashes.size() * sizeof(uint64_t));
}

}  // namespace

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

}  // namespace rnnkern::cpu
