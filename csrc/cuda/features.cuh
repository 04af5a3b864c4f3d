// The input of a forward scan as x itself, of few features: what would be x_proj is made where it
// is used, so that it is neither written nor read, and launches are saved.
//
// Mapping. A lane has the units and rows of its scan, and makes their input by float32
// multiply-adds. They do not depend on the state, and hide behind what does; so it is always
// kMostFeatures of them, those past I being zeros.
//
// On chip. Of W_ih and the biases a lane's units, in registers. Of x a ring of steps in shared
// memory, in which a row is kMostFeatures long.
//
// Traffic. Lane 4 g + q copies word q of row g, for all lanes. A row of x in 16-bit types may begin
// in the middle of a word: it lies in the ring as it does in x, and is shifted when it is read.
//
// Numerics. Exact but for the float32 sums, TF32 or not.
#pragma once
#include "steps.cuh"
#include "words.cuh"

namespace rnnkern::cuda {

// kUnits: of a lane; kSlots: of the ring, the last of which is asked for when the first is loaded.
template <class Element, int kUnits, int kSlots>
class Features {
  static constexpr int kBytes = Element::kBytes;
  static constexpr int kWords = kMostFeatures * kBytes / 4;  // of a row in the ring
  static_assert(kSlots <= 32, "a bit for each");

 public:
  static constexpr int kRow = 4 * kWords;

  // Rows first_row and up of the batch; units first, first + by, and so on of the group.
  RNNKERN_DEV Features(const Scan& p, int group, int first_row, int first, int by)
      : x_(static_cast<const char*>(p.input)),
        row_bytes_(p.features * kBytes),
        at_tile_(static_cast<int64_t>(first_row) * row_bytes_) {
    RNNKERN_UNROLL
    for (int i = 0; i < kUnits; ++i) {
      const int n = first + i * by;
      const bool is_unit = n < p.units;
      own_ += is_unit;
      RNNKERN_UNROLL
      for (int k = 0; k < kMostFeatures; ++k) {
        weight_[i][k] = is_unit && k < p.features
                            ? load_element<Element>(address_of<Element>(p.weight_ih, group, n, k))
                            : 0.0f;
      }
      bias_[i] = 0.0f;
      if (is_unit && p.bias_ih.at) {
        bias_[i] = load_element<Element>(address_of<Element>(p.bias_ih, group, n, 0)) +
                   load_element<Element>(address_of<Element>(p.bias_hh, group, n, 0));
      }
    }
  }

  RNNKERN_DEV int row_bytes() const { return row_bytes_; }

  // Copies rows lane / 4 and each 8th from there of a tile to a slot; row[h]: which of the batch.
  template <int halves>
  RNNKERN_DEV void ask(uint32_t slot, const Steps& step, const int (&row)[halves]) {
    const int lane = thread() & 31, q = lane & 3;
    const int64_t at = step.offset + at_tile_;
    if (kBytes == 2) odd_ = odd_ << 1 | (static_cast<uint32_t>(at) >> 1 & 1);
    RNNKERN_UNROLL
    for (int h = 0; h < halves; ++h) {
      const int n = (lane >> 2) + 8 * h;
      const int64_t at_row = at + n * row_bytes_;
      const int before = kBytes == 2 ? static_cast<int>(at_row) & 2 : 0;  // the row, in its word
      const int left = before + row_bytes_ - 4 * q;
      if (q < kWords && row[h] < step.size) {
        copy_async_part(slot + n * kRow + 4 * q, x_ + at_row - before + 4 * q,
                        left < 0   ? 0
                        : left < 4 ? left
                                   : 4);
      }
    }
  }

  // Row n of the tile, from the slot that was asked for kSlots - 1 calls before.
  RNNKERN_DEV void load(uint32_t slot, int n, float (&x)[kMostFeatures]) const {
    uint32_t words[kWords];
    load_shared_words<kWords>(slot + n * kRow, words);
    if constexpr (kBytes == 2) {
      const uint32_t odd = ((odd_ >> (kSlots - 2)) + n * row_bytes_ / 2) & 1;
      const uint64_t row = (words[0] | static_cast<uint64_t>(words[1]) << 32) >> 16 * odd;
      words[0] = static_cast<uint32_t>(row);
      words[1] = static_cast<uint32_t>(row >> 32);
    }
    unpack<Element, kWords>(words, x);
  }

  // The input of the lane's i-th unit.
  RNNKERN_DEV float product(int i, const float (&x)[kMostFeatures]) const {
    float sum = bias_[i];
    RNNKERN_UNROLL
    for (int k = 0; k < kMostFeatures; ++k) sum += weight_[i][k] * x[k];
    return i < own_ ? sum : 0.0f;  // 0 * inf is not
  }

 private:
  const char* x_;
  int row_bytes_;
  int64_t at_tile_;   // bytes from a step's first row
  uint32_t odd_ = 0;  // of the last steps asked for: whether the tile begins in a word's middle
  int own_ = 0;       // units that there are
  float weight_[kUnits][kMostFeatures], bias_[kUnits];
};

}  // namespace rnnkern::cuda
