// What the host entry (scan.cpp) hands to one instruction set's kernels (scan_kernel.h). No torch
// header comes in here: a translation unit compiled for AVX-512 must not emit inline functions that
// the linker could then share with code meant for an older processor.
#pragma once
#include <cstdint>

#include "../activation.h"

namespace rnnkern::cpu {

enum class Recurrence { kForward, kBackward, kLinear };
enum class DType { kDouble, kFloat, kBFloat16, kHalf };

// One scan. "rows" are (N, G*H) in time-major order; row (t, b) is offset(t) + b.
struct ScanParams {
  Recurrence recurrence;
  Activation activation;
  DType dtype;
  int64_t steps, batch, hidden, groups;
  const int64_t* batch_sizes;  // (T,), null for a plain batch
  const int64_t* offsets;      // (T,), null for a plain batch
  const bool* reverse;  // (G,) in scan order: the backward of a forward group runs in reverse
  const void* input;    // rows: x_proj | grad_h or null | u
  const void* aux;      // rows: null   | h              | gain
  const void* initial;  // (G, B, H): h0 or null | null             | s0 or null
  const void* entry;    // (G, B, H): null       | grad_h_n or null | null; joins where a row enters
  void* output;         // rows: h | v | s
  const void* panels;   // G packed matrices, packed_bytes() apart

  int64_t size(int64_t t) const { return batch_sizes ? batch_sizes[t] : batch; }
  int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * batch; }
};

// A square matrix as the kernels find it: element (k, n) multiplies state k into unit n.
struct MatrixView {
  const void* data;
  int64_t stride_k, stride_n;
};

// One instruction set.
struct Kernels {
  const char* name;
  int64_t (*packed_bytes)(DType dtype, int64_t hidden);
  int64_t (*state_bytes)(DType dtype, int64_t hidden, int64_t rows);
  int64_t (*panels)(DType dtype, int64_t hidden);
  // Packs panels [first, last) of a matrix into dst, the start of its packed_bytes().
  void (*pack)(DType dtype, MatrixView matrix, int64_t hidden, int64_t first, int64_t last,
               void* dst);
  // Runs rows [begin, end) of one group through all steps. state: state_bytes() of scratch.
  void (*scan)(const ScanParams& params, int64_t group, int64_t begin, int64_t end, void* state);
};

extern const Kernels kDefaultKernels;
#ifdef __x86_64__
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

}  // namespace rnnkern::cpu
