// A hash of a block of memory, by which packed.cpp sees that a weight is still the one it packed.
#pragma once
#include "vec.h"

namespace rnnkern::cpu::RNNKERN_ISA {

// In lanes of 32 bits, of so many vectors that their multiplications need not wait for each other.
// Each turns its high bits down, where the next multiplication spreads them: plain hashes miss
// W.data.mul_(0.5), which takes the same from every word. No step loses anything: of a lane's words
// one that differs is always seen, and of several all but one change in 2^32. 16 MB take one thread
// of a Zen 4 0.32 ms, 1.13 in words of 64 bits by what every x86 processor has.
static uint64_t hash(const void* data, int64_t bytes) {
  constexpr int vecs = 8;
  constexpr int64_t block = vecs * RNNKERN_VECTOR_BYTES;
  const auto* from = static_cast<const unsigned char*>(data);
  Words hashes[vecs] = {};
  int64_t at = 0;
  for (; at + block <= bytes; at += block) {
#pragma GCC unroll 8
    for (int i = 0; i < vecs; ++i) {
      const Words words = load_vec<Words>(from + at + i * RNNKERN_VECTOR_BYTES);
      const Words mixed = (hashes[i] ^ words) * 0x9e3779b1u;
      hashes[i] = mixed << 13 | mixed >> 19;
    }
  }
  uint64_t all = bytes;
  const auto mix = [&](uint64_t word) {
    const uint64_t mixed = (all ^ word) * 0x9e3779b97f4a7c15u;
    all = mixed << 29 | mixed >> 35;
  };
  for (const Words& of_vec : hashes) {
    for (int lane = 0; lane < kLanes<float>; ++lane) mix(of_vec[lane]);
  }
  for (; at < bytes; ++at) mix(from[at]);
  return all;
}

}  // namespace rnnkern::cpu::RNNKERN_ISA
