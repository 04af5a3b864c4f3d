// The steps of a scan, read on the host.
#pragma once
#include "signatures.h"

namespace rnnkern {

// The arrays are those of packed rows.
struct Steps {
  int64_t count, batch, rows;
  std::vector<int64_t> sizes, offsets;

  Steps(const Tensor& x, const OptTensor& batch_sizes, const OptTensor& initial);

  bool packed() const { return !sizes.empty(); }
  int64_t offset(int64_t t) const { return packed() ? offsets[t] : t * batch; }
  int64_t size(int64_t t) const { return packed() ? sizes[t] : batch; }
  // How many steps row b takes part in.
  int64_t length(int64_t b) const;
  // For every row, the row that comes before it in scan order, or ~b if that is row b's initial
  // state.
  std::vector<int64_t> previous(bool reverse) const;
  // The bounds of `parts` ranges of batch rows with about equal numbers of steps in each.
  std::vector<int64_t> split(int64_t parts) const;
};

}  // namespace rnnkern
