// Walks the steps of a scan in the order in which a group runs them.
#pragma once
#include "device.cuh"
#include "scan.h"

namespace rnnkern::cuda {

RNNKERN_DEV bool runs_backwards(const Scan& p, int group) {
  return p.reverse[group >> 5] >> (group & 31) & 1;
}

// A step's batch size, and how many bytes into the rows its first row is. Past the last step the
// size is 0.
struct Step {
  int size;
  int64_t offset;
};

// The t-th step, for kernels that have no registers to spare; to be asked for before it is needed.
RNNKERN_DEV Step step_at(const Scan& p, bool backwards, int64_t t, int64_t row_bytes) {
  if (t >= p.steps) return {0, 0};
  const int64_t at = backwards ? p.steps - 1 - t : t;
  if (!p.table) return {p.batch, at * p.batch * row_bytes};
  return {static_cast<int>(load_global64(p.table + at)),
          load_global64(p.table + p.steps + at) * row_bytes};
}

// The same for kernels whose every instruction counts: the offset is of a place `at` bytes into the
// step's rows, and a plain batch's size does not change, not even past the last step.
template <bool packed>
class Steps;

template <>
class Steps<false> {
 public:
  RNNKERN_DEV Steps(const Scan& p, int group, int64_t row_bytes, int64_t at) : size(p.batch) {
    const bool backwards = runs_backwards(p, group);
    by_ = (backwards ? -1 : 1) * p.batch * row_bytes;
    hold(by_);
    offset = at + (backwards ? (1 - p.steps) * by_ : 0);
  }
  RNNKERN_DEV void next() { offset += by_; }

  const int size;
  int64_t offset;

 private:
  int64_t by_;
};

// The table's entries are asked for a step ahead; past the last step the size is 0.
template <>
class Steps<true> {
 public:
  RNNKERN_DEV Steps(const Scan& p, int group, int64_t row_bytes, int64_t at)
      : p_(p), row_bytes_(row_bytes), at_(at) {
    const bool backwards = runs_backwards(p, group);
    by_ = backwards ? -1 : 1;
    step_ = backwards ? p.steps - 1 : 0;
    ask();
    next();
  }
  RNNKERN_DEV void next() {
    size = size_;
    offset = row_ * row_bytes_ + at_;
    ask();
  }

  int size;
  int64_t offset;

 private:
  RNNKERN_DEV void ask() {
    size_ = 0;
    if (0 <= step_ && step_ < p_.steps) {
      size_ = static_cast<int>(load_global64(p_.table + step_));
      row_ = load_global64(p_.table + p_.steps + step_);
    }
    step_ += by_;
  }

  const Scan& p_;
  int64_t row_bytes_, at_, step_, row_ = 0;  // step_: to be asked for next
  int by_, size_;
};

}  // namespace rnnkern::cuda
