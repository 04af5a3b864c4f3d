// What the host side (runner.cpp, products.cpp, packed.cpp) hands to one instruction set's kernels
// (scan_kernel.h).
// No torch header comes in here: a translation unit compiled for AVX-512 must not emit inline
// functions that the linker could then share with code meant for an older processor.
#pragma once
#include <cstdint>

#include "../activation.h"

namespace rnnkern::cpu {

enum class Recurrence { kForward, kLayer, kBackward, kLinear };
// kInt8: float rows, int8 weights. kSplit: float, multiplied as sums of three bfloat16.
enum class DType { kDouble, kFloat, kBFloat16, kHalf, kInt8, kSplit };

// A matrix as the kernels find it: element (k, n) multiplies state or feature k into unit n.
struct MatrixView {
  const void* data;
  int64_t stride_k, stride_n, depth, width;  // k < depth, n < width
};

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
  const void* input;           // rows   x_proj     | x (N, I)   | grad_h or null     | u
  const void* aux;             // rows   -          | -          | h                  | gain
  const void* initial;         // (G,B,H) h0 or null | h0 or null | -                  | s0 or null
  const void* entry;           // (G,B,H) -         | -          | grad_h_n or null   | -
  void* output;                // rows   h          | h          | v                  | s
  const void* const* panels;   // G packed matrices
  const MatrixView* matrices;  // G, as they were before, of kSplit
  const float* const* scales;  // G (H,), of kInt8: what unit i's weights are multiplied by
  // Elements from a row of a group's input to the next, and from a group's to the next group's: of
  // kForward and kLayer; otherwise as in other rows.
  int64_t input_stride, input_apart;
  bool from_zero;            // rows enter with a zero state, whose products are known to be zero
  int64_t features;          // I, of kLayer
  const void* input_panels;  // of kLayer: G packed input weights, input_bytes() apart

  int64_t size(int64_t t) const { return batch_sizes ? batch_sizes[t] : batch; }
  int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * batch; }
};

// The biases are contiguous (H,), or both null.
struct InputWeights {
  MatrixView weight;
  const void *bias_ih, *bias_hh;
};

// out (N, width) = or, to add, += a (N, depth) times a matrix, + bias. out may be a, but not of
// kSplit nor direct, if its rows lie as a's do and all panels of a row are made in one call.
struct MatmulParams {
  const void *a, *panels;         // panels: null if each is to be packed where it is used
  MatrixView matrix;              // of which the panels are
  const void *bias_ih, *bias_hh;  // (width,), or both null
  void* out;
  int64_t a_stride, out_stride;
  bool add;
  bool direct;  // of float32 or float64, from the matrix' rows as they lie, without biases
};

// out (M, width) = v^T a: the sum over N rows of outer products, v (N, M) and a (N, width).
// In 16 bits Kernels::outer's out is of float32, in which it is added up.
struct OuterParams {
  const void *v, *a;
  // Which row of a goes with a row of v, null: the same. ~i is row i of initial, or zeros if that
  // is null.
  const int64_t* a_rows;
  const void* initial;
  void* out;
  int64_t n, m, width, v_stride, a_stride, initial_stride, out_stride;
  bool direct;  // of float32 or float64, from the rows as they lie, without scratch
};

// A thread's part in a scan whose columns several threads share; they meet after every step.
class Member {
 public:
  struct Columns {
    int64_t first, last;  // panels
  };
  // Waits for the states of the step before; which panels to compute now. None: the others do the
  // rest.
  virtual Columns begin(int64_t step) = 0;
  virtual void end(int64_t step) = 0;
  // The panels that this member, and it alone, has computed in every step so far, if they are one
  // of the two halves of all; else none. What it makes of them need not wait for begin(), which may
  // yet give it all panels.
  virtual Columns own_half() const { return {0, 0}; }

 protected:
  ~Member() = default;
};

// What one thread runs: rows [begin, end) of some groups side by side, whose steps the processor
// overlaps. At most kMostGroups; their states are state_bytes apart.
constexpr int64_t kMostGroups = 8;
struct Part {
  int64_t group, groups, begin, end;
  void* state;
  int64_t state_bytes;
};

// One instruction set. Sizes in bytes; a range of panels is of kPanel columns each.
struct Kernels {
  const char* name;
  bool emulated;                      // runs where the processor lacks it, for tests
  bool splits;                        // knows kSplit
  bool (*has_products)(DType dtype);  // whether the larger products below know it
  int64_t (*panel_columns)(DType dtype);
  int64_t (*packed_bytes)(DType dtype, int64_t depth, int64_t width);
  int64_t (*row_bytes)(DType dtype, int64_t width);  // of a state, or of a row of a product
  int64_t (*input_bytes)(DType dtype, int64_t hidden, int64_t features);
  // Packs panels [first, last) of a matrix into dst, the start of its packed_bytes().
  void (*pack)(DType dtype, const MatrixView& matrix, int64_t first, int64_t last, void* dst);
  void (*pack_input)(DType dtype, const InputWeights& weights, void* dst);
  uint64_t (*hash)(const void* data, int64_t bytes);
  // Puts the initial states of a part into its memory, of each group twice row_bytes() a row, and
  // then runs them through all steps, or a team's member its panels of them.
  void (*start)(const ScanParams& params, const Part& part);
  void (*scan)(const ScanParams& params, const Part& part, Member* member);
  // Rows [begin, end) of panels [first, last) of a product. Scratch: row_bytes() for each row, but
  // not of float32 and float64 unless out is a; and what one panel is packed into, if it is to be.
  void (*matmul)(DType dtype, const MatmulParams& params, int64_t begin, int64_t end, int64_t first,
                 int64_t last, void* scratch);
  // Tiles of rows [first, last) of a sum of outer products, outer_tiles() in all; outer_bytes() of
  // scratch.
  int64_t (*outer_tiles)(DType dtype, int64_t m);
  int64_t (*outer_bytes)(DType dtype, int64_t n, int64_t m, int64_t width);
  void (*outer)(DType dtype, const OuterParams& params, int64_t first, int64_t last, void* scratch);
  // out (width,) = the sum of n rows of v, panels [first, last).
  void (*column_sums)(DType dtype, const void* v, int64_t n, int64_t v_stride, int64_t width,
                      int64_t first, int64_t last, void* out);
};

extern const Kernels kDefaultKernels;
#ifdef __x86_64__
extern const Kernels kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels, kAmxKernels;
#endif

}  // namespace rnnkern::cpu
