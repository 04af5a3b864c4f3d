// What the host hands to a scan's kernel. No torch header and no CUDA header comes in here, so that
// nvcc alone compiles the kernels, and a host compiler does against tests/cuda/simulator.h.
//
// Letters: T steps, B batch, I features, H hidden_size, G groups, N rows (the sum over t of the
// batch size at t).
#pragma once
#include <cstdint>

#include "../activation.h"

namespace rnnkern::cuda {

// kLayer: kForward from x itself, of few features.
enum class Recurrence { kForward, kBackward, kLinear, kLayer };

// What products are made of, and with it what rows, states and weights are: bfloat16, float16, or
// float32 multiplied as TF32, once or, to float32's accuracy, three times (or by fma.cuh as it is).
enum class Precision { kBFloat16, kHalf, kTf32, kTf32x3 };
constexpr int element_bytes(Precision p) {
  return p == Precision::kBFloat16 || p == Precision::kHalf ? 2 : 4;
}

constexpr int kMostGroups = 1024;  // of one launch
// Of a row of x, for kLayer: what fills one product's depth, at any place in a word.
constexpr int kMostRowBytes = 16;

// G matrices on the device, or vectors, k being 0: element (n, k) of group g is
// at[g * stride_g + n * stride_n + k * stride_k].
struct Matrices {
  const void* at;
  int64_t stride_g, stride_n, stride_k;
};

// One scan. "rows" are (N, G*H) in time-major order, row (t, b) is first(t) + b; "states" are
// (G, B, H). All are contiguous, start at multiples of 16 bytes, and a row of a group is a multiple
// of 16 bytes long (launch.cu pads).
struct Scan {
  Recurrence recurrence;
  Activation activation;
  int64_t steps;
  int batch, hidden, groups;
  int tile_rows;  // how many rows of the batch a tile is of
  int64_t
      row_stride;  // elements from row to row: G*H, or more where these are some groups of several
  //                        kForward   | kBackward        | kLinear
  const void* input;     // rows   x_proj     | grad_h or null   | u
  const void* aux;       // rows   -          | h                | gain
  const void* initial;   // states h0 or null | -                | s0 or null
  const void* entry;     // states -          | grad_h_n or null | -
  void* output;          // rows   h          | v                | s
  void* last;            // states each row's after its last step, or null
  Matrices weight;       // (H, H) what multiplies state unit k into unit n
  const int64_t* table;  // (2, T) on the device: each step's batch size and first row; plain: null
  uint32_t reverse[kMostGroups / 32];  // a bit for each group, in scan order
  // Of kLayer alone, whose input is x (N, I).
  int features;                          // I
  Matrices weight_ih, bias_ih, bias_hh;  // (H, I), (H), (H); both biases or neither
};

}  // namespace rnnkern::cuda
