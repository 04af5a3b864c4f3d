// The device layer: every instruction that the kernels use beyond plain C++, one inline function
// each. tests/cuda/simulator.h has the same names for the host, where each CUDA thread is a fiber,
// and what is asynchronous here completes there as late and in as strange an order as it may.
//
// References: "PTX" is the PTX ISA 9.0 (docs.nvidia.com/cuda/parallel-thread-execution), by the
// heading of the instruction.
#pragma once
#ifdef RNNKERN_SIMULATE
#include "simulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define RNNKERN_DEV __device__ __forceinline__
#define RNNKERN_UNROLL _Pragma("unroll")

namespace rnnkern::cuda {

// ---- where a thread is ----

RNNKERN_DEV int thread() { return threadIdx.x; }
RNNKERN_DEV int block_x() { return blockIdx.x; }
RNNKERN_DEV int block_y() { return blockIdx.y; }
RNNKERN_DEV int blocks_x() { return gridDim.x; }
// Of a one-dimensional cluster along x. PTX: %cluster_ctarank, %clusterid.
RNNKERN_DEV uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
RNNKERN_DEV uint32_t cluster_x() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(r));
  return r;
}

// ---- shared memory, by 32-bit addresses ----

RNNKERN_DEV uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared));
}
// The same place in the shared memory of another CTA of the cluster. PTX: mapa.
RNNKERN_DEV uint32_t shared_of(uint32_t address, uint32_t rank) {
  uint32_t r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}

struct Words2 {
  uint32_t x, y;
};
struct Words4 {
  uint32_t x, y, z, w;
};

// PTX: ld, st
RNNKERN_DEV uint32_t load_shared(uint32_t a) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(a) : "memory");
  return v;
}
RNNKERN_DEV Words2 load_shared2(uint32_t a) {
  Words2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a) : "memory");
  return v;
}
RNNKERN_DEV Words4 load_shared4(uint32_t a) {
  Words4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(a)
               : "memory");
  return v;
}
RNNKERN_DEV void store_shared(uint32_t a, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(a), "r"(v) : "memory");
}
RNNKERN_DEV void store_shared4(uint32_t a, Words4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// ---- global memory ----

// Of what nobody writes meanwhile. PTX: ld.global.nc
RNNKERN_DEV uint16_t load_global16(const void* p) { return __ldg(static_cast<const uint16_t*>(p)); }
RNNKERN_DEV uint32_t load_global(const void* p) { return __ldg(static_cast<const uint32_t*>(p)); }
RNNKERN_DEV Words2 load_global2(const void* p) {
  const uint2 v = __ldg(static_cast<const uint2*>(p));
  return {v.x, v.y};
}
RNNKERN_DEV Words4 load_global4(const void* p) {
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return {v.x, v.y, v.z, v.w};
}
RNNKERN_DEV int64_t load_global64(const int64_t* p) {
  return __ldg(reinterpret_cast<const long long*>(p));
}
RNNKERN_DEV void store_global(void* p, uint32_t v) { *static_cast<uint32_t*>(p) = v; }
RNNKERN_DEV void store_global2(void* p, Words2 v) {
  *static_cast<uint2*>(p) = make_uint2(v.x, v.y);
}
RNNKERN_DEV void store_global4(void* p, Words4 v) {
  *static_cast<uint4*>(p) = make_uint4(v.x, v.y, v.z, v.w);
}

// Words that other CTAs write while this one reads: each is read and written whole, in no order
// with others, at the level 2 cache. PTX: ld.relaxed, st.relaxed, "Vector Data-types" (a vector's
// elements are accesses of their own).
RNNKERN_DEV Words4 load_relaxed4(const void* p) {
  Words4 v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
RNNKERN_DEV void store_relaxed(void* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// Between two looks at a word that is not there yet: here nothing, in the simulator others' turn.
RNNKERN_DEV void spin() {}

// From global to shared memory, meanwhile; the copies of a thread are in its groups, in order.
// PTX: cp.async, cp.async.commit_group, cp.async.wait_group
template <int bytes>
RNNKERN_DEV void copy_async(uint32_t to, const void* from) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2;" ::"r"(to), "l"(from),
                 "n"(bytes)
                 : "memory");
  }
}
// 4 bytes, of which only the first `size` are read; the others become zeros.
RNNKERN_DEV void copy_async_part(uint32_t to, const void* from, int size) {
  asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(size)
               : "memory");
}
RNNKERN_DEV void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `pending` of this thread's latest groups are under way.
template <int pending>
RNNKERN_DEV void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- threads meet ----

RNNKERN_DEV void block_sync() { __syncthreads(); }
RNNKERN_DEV void warp_sync() { __syncwarp(); }
// PTX: barrier.cluster
RNNKERN_DEV void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
RNNKERN_DEV uint32_t shuffle(uint32_t v, int from_lane) {
  return __shfl_sync(0xffffffffu, v, from_lane);
}

// Barriers in shared memory that count bytes. PTX: mbarrier, and "Asynchronous operations".
RNNKERN_DEV void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the initialisations, before others in the cluster use them.
RNNKERN_DEV void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrive at the present phase, which further waits for so many bytes.
RNNKERN_DEV void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}
// Until the phase of this parity is complete; what its senders wrote is visible then. A wait that
// acquires at cluster scope flushes the level 1 cache each time (CCTL.IVALL); a relaxed wait and a
// fence restricted to shared memory say the same of all that matters here, and cost nothing.
RNNKERN_DEV void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
  asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
}
// 16 bytes to the shared memory of a CTA of the cluster, meanwhile; on arrival they are counted by
// its barrier. Both addresses are shared_of()'s. PTX: st.async
RNNKERN_DEV void send(uint32_t to, Words4 v, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
      : "memory");
}
// What came by send() before wgmma reads it: that goes another way (the async proxy). PTX:
// fence.proxy
RNNKERN_DEV void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- matrices: 8 rows of 16 bytes between shared memory and a warp ----

// Lane l gives the address of row l % 8 of matrix l / 8, and gets the 4 bytes l % 4 of row l / 4 of
// each. PTX: ldmatrix
RNNKERN_DEV void load_matrices(uint32_t address, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// The same of 16-bit elements, transposed: lane l gets elements 2 (l % 4) and the next of column
// l / 4. PTX: ldmatrix (.trans)
RNNKERN_DEV void load_transposed(uint32_t address, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// Of two matrices; lanes 0 to 15 give the addresses.
RNNKERN_DEV void load_transposed(uint32_t address, uint32_t (&r)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}
// And back. PTX: stmatrix (.trans), of compute capability 9.0
RNNKERN_DEV void store_transposed(uint32_t address, const uint32_t (&r)[2]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
               "r"(r[0]), "r"(r[1])
               : "memory");
#else
  RNNKERN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int lane = threadIdx.x & 31, matrix = i >> 1, half = i & 1;
    const uint32_t row = __shfl_sync(0xffffffffu, address, matrix * 8 + 2 * (lane & 3) + half);
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(row + (lane >> 2) * 2),
                 "h"(static_cast<uint16_t>(r[matrix] >> (16 * half)))
                 : "memory");
  }
#endif
}

// Keeps a value that a loop needs in a register, where the compiler would work it out in each turn.
RNNKERN_DEV void hold(int& v) { asm volatile("" : "+r"(v)); }
RNNKERN_DEV void hold(int64_t& v) { asm volatile("" : "+l"(v)); }

// ---- element types ----

RNNKERN_DEV uint32_t bits(float f) { return __float_as_uint(f); }
RNNKERN_DEV float number(uint32_t u) { return __uint_as_float(u); }

struct BFloat16 {
  static constexpr int kBytes = 2;
  static constexpr bool kApproximate = true;  // of tanh: an eighth of what a bfloat16 is rounded by
  static RNNKERN_DEV uint32_t pack(float a, float b) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static RNNKERN_DEV void unpack(uint32_t v, float& a, float& b) {
    a = __uint_as_float(v << 16);
    b = __uint_as_float(v & 0xffff0000u);
  }
};
struct Half {
  static constexpr int kBytes = 2;
  static constexpr bool kApproximate = false;
  static RNNKERN_DEV uint32_t pack(float a, float b) {
    const __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static RNNKERN_DEV void unpack(uint32_t v, float& a, float& b) {
    const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&v));
    a = f.x;
    b = f.y;
  }
};
struct Tf32 {
  static constexpr int kBytes = 4;
  static constexpr bool kApproximate = false;
  // What a product is to see of a float32: rounded to nearest, where the product would cut off.
  // PTX: cvt.rna.tf32
  static RNNKERN_DEV uint32_t operand(uint32_t v) {
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(number(v)));
    return r;
  }
};
struct Tf32x3 {
  static constexpr int kBytes = 4;
  static constexpr bool kApproximate = false;
  static RNNKERN_DEV uint32_t operand(uint32_t v) { return v; }
};

// ---- tensor cores: d (16 x 8) += a (16 x k) b (k x 8), k = 32 / kBytes ----
// Lane l = 4 g + q has of a the words (row g + 8 (i % 2), word q + 4 (i / 2)), i < 4, of b the
// words (word q + 4 i, column g), i < 2, and of d the elements (row g + 8 (i / 2), column 2 q + i %
// 2). PTX: "Matrix Fragments for mma.m16n8k16 with floating point type", "... for mma.m16n8k8"

RNNKERN_DEV void multiply(BFloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                          uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
RNNKERN_DEV void multiply(Half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
RNNKERN_DEV void multiply(Tf32, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- wgmma: a warpgroup's d (64 x n) = or += a (64 x 16) in registers times b (16 x n) ----
// Warp w of the four has rows 16 w to 16 w + 15 of a and d, laid out as multiply()'s; d[4 j + i] is
// of columns 8 j and up. b's columns are rows of 128 bytes in shared memory, eight to an atom, 16
// bytes c of row n at c ^ (n % 8). PTX: "Asynchronous Warpgroup Level Matrix Instructions"

RNNKERN_DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
RNNKERN_DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
RNNKERN_DEV void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// The same in all lanes, and so that the compiler knows.
RNNKERN_DEV uint32_t uniform(uint32_t v) { return __shfl_sync(0xffffffffu, v, 0); }

// add false: d is written. (To set it to zero first makes the assembler wait for each product.)
#define RNNKERN_WGMMA(TYPE, NAME, N, D, OUT, A, B, P)                                             \
  RNNKERN_DEV void wgmma(TYPE, float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P                                            \
                 ", 0;\n"                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" D "}, " A   \
                 ", " B ", p, 1, 1, 0;\n}"                                                        \
                 : OUT                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));            \
  }
#define RNNKERN_OUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RNNKERN_OUT8 RNNKERN_OUT4(0), RNNKERN_OUT4(4)
#define RNNKERN_OUT16 RNNKERN_OUT8, RNNKERN_OUT4(8), RNNKERN_OUT4(12)
#define RNNKERN_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define RNNKERN_D16 RNNKERN_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define RNNKERN_WGMMA_OF(TYPE, NAME)                                                          \
  RNNKERN_WGMMA(TYPE, NAME, 16, RNNKERN_D8, RNNKERN_OUT8, "{%8, %9, %10, %11}", "%12", "%13") \
  RNNKERN_WGMMA(TYPE, NAME, 32, RNNKERN_D16, RNNKERN_OUT16, "{%16, %17, %18, %19}", "%20", "%21")
RNNKERN_WGMMA_OF(BFloat16, "bf16")
RNNKERN_WGMMA_OF(Half, "f16")
#undef RNNKERN_WGMMA_OF
#undef RNNKERN_D16
#undef RNNKERN_D8
#undef RNNKERN_OUT16
#undef RNNKERN_OUT8
#undef RNNKERN_OUT4
#undef RNNKERN_WGMMA

// ---- elementary functions ----

// One instruction, off by 2^-11 at most. PTX: tanh
RNNKERN_DEV float approximate_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Within 2 + |1.173 x| ulp; what is subnormal is 0. PTX: ex2
RNNKERN_DEV float exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
RNNKERN_DEV float log(float x) { return logf(x); }
// Within 2 ulp, |b| < 2^126; what is subnormal is 0. PTX: div
RNNKERN_DEV float divide(float a, float b) {
  float y;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
RNNKERN_DEV float absolute(float x) { return fabsf(x); }

}  // namespace rnnkern::cuda
#endif

// ---- what is made of these ----

namespace rnnkern::cuda {

// Each factor as a sum of two TF32, whose products but the smallest add up to float32's accuracy.
// high is cut off, so low is exact but for its own last bits, which the product cuts off. What is
// not finite is low's alone: it then meets the whole of the other factor, which is 0 or has a sign,
// and not that one's low, which may be 0 or of the other sign.
RNNKERN_DEV void split(uint32_t x, uint32_t& high, uint32_t& low) {
  const bool is_finite = (x & 0x7f800000u) != 0x7f800000u;
  high = is_finite ? x & 0xffffe000u : 0u;
  const float rest = number(x) - number(high);
  low = is_finite ? bits(rest) : x;
}
RNNKERN_DEV void multiply(Tf32x3, float (&d)[4], const uint32_t (&a)[4],
                          const uint32_t (&high_b)[2], const uint32_t (&low_b)[2]) {
  uint32_t high[4], low[4];
  RNNKERN_UNROLL
  for (int i = 0; i < 4; ++i) split(a[i], high[i], low[i]);
  multiply(Tf32{}, d, low, high_b[0], high_b[1]);
  multiply(Tf32{}, d, high, low_b[0], low_b[1]);
  multiply(Tf32{}, d, high, high_b[0], high_b[1]);
}
RNNKERN_DEV void multiply(Tf32x3, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t high[2], low[2];
  split(b0, high[0], low[0]);
  split(b1, high[1], low[1]);
  multiply(Tf32x3{}, d, a, high, low);
}

// The operand of an atom's address (or of 32, 64 or 96 bytes on), and that of so many bytes on.
RNNKERN_DEV uint64_t wgmma_operand(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | (1ull << 16) |
         (static_cast<uint64_t>(1024 >> 4) << 32) | (1ull << 62);
}
RNNKERN_DEV uint64_t wgmma_operand_on(uint64_t operand, uint32_t bytes) {
  // No carry leaves the address: 32 bits, of which the compiler knows the upper half.
  return (operand & 0xffffffff00000000u) | (static_cast<uint32_t>(operand) + (bytes >> 4));
}

}  // namespace rnnkern::cuda
