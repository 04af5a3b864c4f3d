// What the host side (runner.cpp, ops.cpp) hands to one instruction set's kernels (scan_kernel.h).
// No torch header comes in here: a translation unit compiled for AVX-512 must not emit inline
// functions that the linker could then share with code meant for an older processor.
#pragma once
#include <cstdint>

#include "../activation.h"

namespace rnnkern::cpu {

enum class Recurrence { kForward, kLayer, kBackward, kLinear };
enum class DType { kDouble, kFloat, kBFloat16, kHalf };

// One scan. "rows" are (N, G*H) in time-major order; row (t, b) is offset(t) + b.
struct ScanParams {
  Recurrence recurrence;
  Activation activation;
  DType dtype;
  int64_t steps, batch, hidden, groups;
  const int64_t* batch_sizes;  // (T,), null for a plain batch
  const int64_t* offsets;      // (T,), null for a plain batch
  const bool* reverse;         // (G,) in scan order: a forward group's backward runs in reverse
  //                              kForward   | kLayer     | kBackward          | kLinear
  const void* input;         // rows   x_proj     | x (N, I)   | grad_h or null     | u
  const void* aux;           // rows   -          | -          | h                  | gain
  const void* initial;       // (G,B,H) h0 or null | h0 or null | -                  | s0 or null
  const void* entry;         // (G,B,H) -         | -          | grad_h_n or null   | -
  void* output;              // rows   h          | h          | v                  | s
  const void* panels;        // G packed matrices, packed_bytes() apart
  int64_t features;          // I, of kLayer
  const void* input_panels;  // of kLayer: G packed input weights, input_bytes() apart

  int64_t size(int64_t t) const { return batch_sizes ? batch_sizes[t] : batch; }
  int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * batch; }
};

// A matrix as the kernels find it: element (k, n) multiplies state or feature k into unit n.
struct MatrixView {
  const void* data;
  int64_t stride_k, stride_n;
};

// The biases are contiguous (H,), or both null.
struct InputWeights {
  MatrixView weight;
  const void *bias_ih, *bias_hh;
  int64_t features;
};

// out (m, k) = or, to add, += v^T a over n rows; double or float.
struct OuterParams {
  const void *v, *a;
  void* out;
  int64_t n, m, k, v_stride, a_stride;
  bool add;
};

// One instruction set.
struct Kernels {
  const char* name;
  int64_t (*packed_bytes)(DType dtype, int64_t hidden);
  int64_t (*state_bytes)(DType dtype, int64_t hidden, int64_t rows);
  int64_t (*input_bytes)(DType dtype, int64_t hidden, int64_t features);
  int64_t (*panels)(DType dtype, int64_t hidden);
  // Packs panels [first, last) of a matrix into dst, the start of its packed_bytes().
  void (*pack)(DType dtype, MatrixView matrix, int64_t hidden, int64_t first, int64_t last,
               void* dst);
  void (*pack_input)(DType dtype, const InputWeights& weights, int64_t hidden, void* dst);
  // Runs rows [begin, end) of one group through all steps. state: state_bytes() of scratch.
  void (*scan)(const ScanParams& params, int64_t group, int64_t begin, int64_t end, void* state);
  void (*outer)(DType dtype, const OuterParams& params);
};

extern const Kernels kDefaultKernels;
#ifdef __x86_64__
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

}  // namespace rnnkern::cpu
