// The input of a forward scan as x itself, of few features: W_ih x is one more product of each
// step, so that x_proj is neither written nor read, and launches are saved.
//
// Mapping. A row of x, up to 16 bytes, is the first four words of a factor: lane 4 g + q has word q
// of rows g and g + 8. An odd number of 16 bits is a row that may begin in the middle of a word.
// Its words stay as they are in memory, but become the factor's other four, which meet W_ih moved
// by one.
//
// On chip. A ring of steps' words in shared memory, 4 bytes of a lane for each 8 rows.
//
// Numerics. As of the state's product, so TF32 where that is asked for, but of fma.cuh, which takes
// the words alone; the biases are added in float32.
#pragma once
#include "steps.cuh"
#include "words.cuh"

namespace rnnkern::cuda {

// slots: of the ring, the last of which is asked for before the first is loaded.
template <class Element, int slots>
class Features {
  static constexpr int kBytes = Element::kBytes;
  static_assert(slots <= 32, "a bit for each");

 public:
  static constexpr int k8Rows = 128;  // bytes of a slot

  RNNKERN_DEV explicit Features(const Scan& p)
      : x_(static_cast<const char*>(p.input)),
        row_bytes_(p.features * kBytes),
        left_(row_bytes_ - 4 * q()) {}

  // Of a tile's first row.
  template <bool packed>
  RNNKERN_DEV Steps<packed> steps(const Scan& p, int group, int first_row) const {
    return {p, group, row_bytes_,
            static_cast<int64_t>(first_row + lane() / 4) * row_bytes_ + 4 * q()};
  }

  // Copies a step's words, if there is one, to a slot. row: the lane's, of the batch.
  template <class Steps, int halves>
  RNNKERN_DEV void ask(uint32_t slot, const Steps& step, bool is_step, const int (&row)[halves]) {
    const char* from = x_ + step.offset;
    const int before = reinterpret_cast<uintptr_t>(from) & (4 - kBytes);  // in the first word
    odd_ = odd_ << 1 | before >> 1;
    // What follows the row becomes zeros.
    const int size = left_ + before < 0 ? 0 : left_ + before < 4 ? left_ + before : 4;
    RNNKERN_UNROLL
    for (int h = 0; h < halves; ++h) {
      if (is_step && row[h] < step.size) {
        copy_async_part(slot + h * k8Rows + 4 * lane(), from - before + h * 8 * row_bytes_, size);
      }
    }
  }

  // A factor's words q and 4 + q of row g + 8 h.
  RNNKERN_DEV void load(uint32_t slot, int h, uint32_t& word, uint32_t& moved) const {
    word = load_shared(slot + h * k8Rows + 4 * lane());
    moved = 0;
    if constexpr (kBytes == 4) {
      word = Element::operand(word);
    } else if (odd_ >> (slots - 2) & 1) {
      moved = q() ? word : word & 0xffff0000u;  // not the row before
      word = 0;
    }
  }

  // What multiplies them into unit n.
  static RNNKERN_DEV void load_weight(const Scan& p, int group, int n, uint32_t& word,
                                      uint32_t& moved) {
    const int k = q() * (4 / kBytes);
    const auto element = [&](int k) -> uint32_t {
      if (n >= p.hidden || k < 0 || k >= p.features) return 0;
      const char* at = address_of<Element>(p.weight_ih, group, n, k);
      if constexpr (kBytes == 2) {
        return load_global16(at);
      } else {
        return Element::operand(load_global(at));
      }
    };
    word = element(k);
    moved = 0;
    if constexpr (kBytes == 2) {
      moved = element(k - 1) | word << 16;
      word |= element(k + 1) << 16;
    }
  }
  static RNNKERN_DEV float load_bias(const Scan& p, int group, int n) {
    if (n >= p.hidden || !p.bias_ih.at) return 0.0f;
    return load_element<Element>(address_of<Element>(p.bias_ih, group, n, 0)) +
           load_element<Element>(address_of<Element>(p.bias_hh, group, n, 0));
  }

 private:
  static RNNKERN_DEV int lane() { return thread() & 31; }
  static RNNKERN_DEV int q() { return thread() & 3; }

  const char* x_;
  int row_bytes_, left_;  // left_: bytes of a row from the lane's word on
  uint32_t odd_ = 0;      // a bit for each step asked for: whether the lane's rows are moved
};

}  // namespace rnnkern::cuda
