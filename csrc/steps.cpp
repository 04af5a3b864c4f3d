#include "steps.h"

#include <algorithm>

namespace rnnkern {

Steps::Steps(const Tensor& x, const OptTensor& batch_sizes, const OptTensor& initial) {
  if (!batch_sizes) {
    count = x.size(0);
    batch = x.size(1);
    rows = count * batch;
    return;
  }
  const Tensor contiguous = batch_sizes->contiguous();
  const int64_t* data = contiguous.const_data_ptr<int64_t>();
  count = batch_sizes->numel();
  sizes.assign(data, data + count);
  batch = count > 0 ? sizes[0] : initial ? initial->size(1) : 0;
  rows = 0;
  for (int64_t t = 0; t < count; ++t) {
    TORCH_CHECK_VALUE(sizes[t] >= 1 && (t == 0 || sizes[t] <= sizes[t - 1]),
                      "rnnkern: expected batch_sizes to be positive and non-increasing, got ",
                      sizes[t], " at step ", t, " after ", sizes[std::max<int64_t>(t - 1, 0)]);
  }
  for (const int64_t size : sizes) {
    offsets.push_back(rows);
    // Before it is added: a sum of absurd sizes could wrap round to the right one.
    TORCH_CHECK_VALUE(size <= x.size(0) - rows, "rnnkern: expected batch_sizes to add up to the ",
                      x.size(0), " packed rows, got more");
    rows += size;
  }
  TORCH_CHECK_VALUE(rows == x.size(0), "rnnkern: expected batch_sizes to add up to the ", x.size(0),
                    " packed rows, got ", rows);
  TORCH_CHECK_VALUE(!initial || initial->size(1) == batch,
                    "rnnkern: expected an initial state for batch_sizes[0] = ", batch,
                    " rows, got ", initial ? initial->size(1) : 0);
}

int64_t Steps::length(int64_t b) const {
  if (!packed()) return count;
  return std::partition_point(sizes.begin(), sizes.end(), [b](int64_t n) { return n > b; }) -
         sizes.begin();
}

std::vector<int64_t> Steps::previous(bool reverse) const {
  std::vector<int64_t> out;
  out.reserve(rows);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t before = reverse ? t + 1 : t - 1;
    const int64_t there = before < 0 || before >= count ? 0 : std::min(size(t), size(before));
    for (int64_t b = 0; b < there; ++b) out.push_back(offset(before) + b);
    for (int64_t b = there; b < size(t); ++b) out.push_back(~b);
  }
  return out;
}

std::vector<int64_t> Steps::split(int64_t parts) const {
  std::vector<int64_t> bounds(parts + 1, batch);
  bounds[0] = 0;
  if (!packed()) {
    for (int64_t i = 1; i < parts; ++i) bounds[i] = batch * i / parts;
    return bounds;
  }
  int64_t done = 0, part = 1;
  for (int64_t b = 0; b < batch && part < parts; ++b) {
    done += length(b);
    while (part < parts && done * parts >= rows * part) bounds[part++] = b + 1;
  }
  return bounds;
}

}  // namespace rnnkern
