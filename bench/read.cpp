// How fast a core reads weights: the bound of a recurrence of one row, which multiplies each weight
// of W_hh once a step. bench/cpu.py compiles and calls it.

// Adds up `count` floats (a multiple of 128, aligned to 64 bytes), `times` times.
extern "C" float read_weights(const float* data, long count, long times) {
  // In eight independent sums: one alone would wait for its last addition.
  constexpr int sums = 8, lanes = 16;
  typedef float Vector __attribute__((vector_size(64)));
  Vector sum[sums] = {};
  for (long time = 0; time < times; ++time) {
    for (long i = 0; i < count; i += sums * lanes) {
      const auto* at = reinterpret_cast<const Vector*>(data + i);
#pragma GCC unroll 8
      for (int k = 0; k < sums; ++k) sum[k] += at[k];
    }
    asm volatile("" ::: "memory");  // or it would multiply by `times`
  }
  float total = 0;
  for (const Vector& part : sum) {
    for (int lane = 0; lane < lanes; ++lane) total += part[lane];
  }
  return total;
}
