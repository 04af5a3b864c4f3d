// H up to 32, or 64 in 16-bit types: one warp runs a tile of rows, and a state never leaves its
// registers.
//
// Mapping. Rows are a product's M, units its N and its depth. Lane 4 g + q has, of rows g and g +
// 8, kOwn neighbouring units: q kOwn and up. The tensor cores' fragments call them other units,
// column 2 q and the next of product j for the j-th two, but as long as the weights are permuted
// alike, that is but a name; and under it, what a lane has of a step's sums is just what it must
// have of the next step's factor. So a step is products, an epilogue, and products again.
//
// On chip. W in registers, as the products' second factor; the state in registers, as it is
// written.
//
// Traffic. The input (and aux) is copied to shared memory kAhead - 1 steps before it is needed, in
// vectors of 16 bytes (8 of H up to 16 in 16-bit types), or x of few features in words
// (features.cuh); a lane copies what it will need itself. The output is written in such vectors.
//
// Synchronisation. None.
//
// Numerics. Sums in float32, in the order of the depth. The state is rounded once per step, to the
// storage type; Tf32's once more where it is multiplied, not where it is written.
//
// Requirements: compute capability 8.0.
#pragma once
#include "epilogue.cuh"
#include "features.cuh"
#include "kernel.h"
#include "steps.cuh"
#include "words.cuh"

namespace rnnkern::cuda {

template <class Element, int hidden, class Epilogue>
struct WarpScan {
  static constexpr Regime kRegime = Regime::kWarp;
  static constexpr int kCapability = 80;
  static constexpr bool kHopper = false;
  static constexpr int kHidden = hidden, kRows = 16, kUnits = hidden, kThreads = 32;

  static RNNKERN_DEV void run(const Scan& p) {
    // Elementary functions take most of a step's time: rows 8 and up, if none, are left out.
    if (p.table) {
      p.tile_rows > 8 ? run_tile<2, true>(p) : run_tile<1, true>(p);
    } else {
      p.tile_rows > 8 ? run_tile<2, false>(p) : run_tile<1, false>(p);
    }
  }

 private:
  static constexpr int kBytes = Element::kBytes;
  static constexpr int kOwn = hidden / 4;           // a lane's units of a row,
  static constexpr int kWords = kOwn * kBytes / 4;  // in words,
  static constexpr int kVector = kWords < 4 ? kWords : 4;
  static constexpr int kVectors = kWords / kVector;  // of so many each
  static constexpr int kProducts = hidden / 8;       // side by side
  static constexpr int kDeep = hidden * kBytes / 32;
  static constexpr int kStreams = Epilogue::kAux ? 2 : 1;
  static constexpr int kVectorBytes = 32 * kVector * 4;  // of all lanes
  static constexpr int kStream = 2 * kVectors * kVectorBytes;
  static constexpr int kAhead = kStreams * kStream > 2048 ? 8 : 16;
  using X = Features<Element, kAhead>;
  static constexpr int kSlot = Epilogue::kFeatures ? 2 * X::k8Rows : kStreams * kStream;
  static_assert(hidden % 16 == 0, "lanes have whole vectors");

 public:
  static constexpr int kShared = kAhead * kSlot;

 private:
  template <int halves, bool packed>
  static RNNKERN_DEV void run_tile(const Scan& p) {
    const int lane = thread(), g = lane >> 2, q = lane & 3, group = block_y();
    const Epilogue epilogue(p.activation);

    uint32_t weight_ih[kProducts][2];
    float bias[kOwn] = {};
    if constexpr (Epilogue::kFeatures) {
      RNNKERN_UNROLL
      for (int j = 0; j < kProducts; ++j) {
        X::load_weight(p, group, (g >> 1) * kOwn + 2 * j + (g & 1), weight_ih[j][0],
                       weight_ih[j][1]);
      }
      RNNKERN_UNROLL
      for (int i = 0; i < kOwn; ++i) bias[i] = X::load_bias(p, group, q * kOwn + i);
    }

    uint32_t weight[kProducts][kDeep][2];
    RNNKERN_UNROLL
    for (int j = 0; j < kProducts; ++j) {
      RNNKERN_UNROLL
      for (int k = 0; k < kDeep; ++k) {
        RNNKERN_UNROLL
        for (int i = 0; i < 2; ++i) {
          weight[j][k][i] = weight_word<Element>(p, group, (g >> 1) * kOwn + 2 * j + (g & 1),
                                                 q * kOwn + (2 * k + i) * (4 / kBytes));
        }
      }
    }

    const int first_row = block_x() * p.tile_rows;
    int row[halves];  // of the batch; none: more than any
    RNNKERN_UNROLL
    for (int h = 0; h < halves; ++h) {
      row[h] = g + 8 * h < p.tile_rows ? first_row + g + 8 * h : 0x7fffffff;
    }
    bool is_unit[kVectors];
    RNNKERN_UNROLL
    for (int v = 0; v < kVectors; ++v) is_unit[v] = q * kOwn + v * kVector * 4 / kBytes < p.hidden;

    // Of this lane's first vector; a half, 8 rows, on is the next.
    const int64_t row_bytes = p.row_stride * kBytes, half_rows = 8 * row_bytes;
    const int64_t at_rows =
        (first_row + g) * row_bytes + (static_cast<int64_t>(group) * p.hidden + q * kOwn) * kBytes;
    const int64_t half_states = static_cast<int64_t>(8) * p.hidden * kBytes;
    const int64_t at_states =
        ((static_cast<int64_t>(group) * p.batch + first_row + g) * p.hidden + q * kOwn) * kBytes;

    uint32_t state[halves][kWords];  // as it is written; what is no unit stays zero
    RNNKERN_UNROLL
    for (int h = 0; h < halves; ++h) {
      RNNKERN_UNROLL
      for (int w = 0; w < kWords; ++w) state[h][w] = 0;
      if (p.initial && row[h] < p.batch) {
        load_vectors(p.initial, at_states + h * half_states, is_unit, state[h]);
      }
    }

    const uint32_t ring = shared_base() + (Epilogue::kFeatures ? 0 : lane * kVector * 4);
    if (!Epilogue::kFeatures && !p.input) {
      for (int i = 0; i < kAhead * 2 * kVectors; ++i) {
        const int at = i / (2 * kVectors) * kSlot + i % (2 * kVectors) * kVectorBytes;
        RNNKERN_UNROLL
        for (int w = 0; w < kVector; ++w) store_shared(ring + at + 4 * w, 0);
      }
    }
    X x(p);
    Steps<packed> now(p, group, row_bytes, at_rows);
    auto ahead = Epilogue::kFeatures ? x.template steps<packed>(p, group, first_row) : now;
    uint32_t used = 0, free = kShared - kSlot;  // slots of the ring, in bytes
    const auto ask = [&](uint32_t slot, bool is_step) {
      if constexpr (Epilogue::kFeatures) {
        x.ask(ring + slot, ahead, is_step, row);
      } else {
        RNNKERN_UNROLL
        for (int h = 0; h < halves; ++h) {
          RNNKERN_UNROLL
          for (int v = 0; v < kVectors; ++v) {
            if (is_step && row[h] < ahead.size && is_unit[v]) {
              const uint32_t to = ring + slot + (h * kVectors + v) * kVectorBytes;
              const int64_t at = ahead.offset + h * half_rows + v * kVector * 4;
              if (p.input) copy_async<kVector * 4>(to, static_cast<const char*>(p.input) + at);
              if (kStreams == 2) {
                copy_async<kVector * 4>(to + kStream, static_cast<const char*>(p.aux) + at);
              }
            }
          }
        }
      }
      copies_commit();
      ahead.next();
    };
    for (int i = 0; i < kAhead - 1; ++i) ask(i * kSlot, i < p.steps);

    int entered = 0;  // rows below have taken a step
    for (int64_t left = p.steps; left > 0; --left) {
      copies_wait<kAhead - 2>();
      uint32_t in_words[halves][kWords], aux_words[halves][kWords], x_words[4] = {};
      RNNKERN_UNROLL
      for (int h = 0; h < halves; ++h) {
        if constexpr (Epilogue::kFeatures) {
          x.load(ring + used, h, x_words[h], x_words[2 + h]);
        } else {
          RNNKERN_UNROLL
          for (int v = 0; v < kVectors; ++v) {
            const uint32_t from = ring + used + (h * kVectors + v) * kVectorBytes;
            load_shared_words<kVector>(from, in_words[h] + v * kVector);
            if (kStreams == 2) {
              load_shared_words<kVector>(from + kStream, aux_words[h] + v * kVector);
            }
          }
        }
      }
      ask(free, left >= kAhead);
      free = used;
      used = used + kSlot == kShared ? 0 : used + kSlot;

      float sums[kProducts][4];
      RNNKERN_UNROLL
      for (int j = 0; j < kProducts; ++j) {
        RNNKERN_UNROLL
        for (int i = 0; i < 4; ++i) sums[j][i] = bias[2 * j + i % 2];
        if constexpr (Epilogue::kFeatures) {
          multiply(Element{}, sums[j], x_words, weight_ih[j][0], weight_ih[j][1]);
        }
      }
      RNNKERN_UNROLL
      for (int k = 0; k < kDeep; ++k) {
        uint32_t a[4] = {};
        RNNKERN_UNROLL
        for (int h = 0; h < halves; ++h) {
          a[h] = factor(state[h][2 * k]);
          a[2 + h] = factor(state[h][2 * k + 1]);
        }
        RNNKERN_UNROLL
        for (int j = 0; j < kProducts; ++j) {
          multiply(Element{}, sums[j], a, weight[j][k][0], weight[j][k][1]);
        }
      }

      const bool some_enter = Epilogue::kEntry && p.entry && now.size > entered;
      RNNKERN_UNROLL
      for (int h = 0; h < halves; ++h) {
        float sum[kOwn], in[kOwn], aux[kOwn] = {}, entry[kOwn] = {};
        if (!Epilogue::kFeatures) unpack<Element, kWords>(in_words[h], in);
        if (kStreams == 2) unpack<Element, kWords>(aux_words[h], aux);
        const bool here = row[h] < now.size;
        if (some_enter && here && row[h] >= entered) {
          uint32_t words[kWords] = {};
          load_vectors(p.entry, at_states + h * half_states, is_unit, words);
          unpack<Element, kWords>(words, entry);
        }
        RNNKERN_UNROLL
        for (int i = 0; i < kOwn; ++i) sum[i] = sums[i / 2][2 * h + i % 2];
        epilogue(sum, in, aux, entry);
        uint32_t words[kWords];
        pack<Element, kWords>(sum, words);
        RNNKERN_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          // f(0) may not be 0, and 0 * inf is not: what is no unit stays out of the next product.
          // What is no row at all may become anything.
          const bool is_next = is_unit[v] && (!packed || here);
          RNNKERN_UNROLL
          for (int w = v * kVector; w < (v + 1) * kVector; ++w) {
            state[h][w] = is_next ? words[w] : state[h][w];
          }
          if (here && is_unit[v]) {
            store_words<kVector>(
                static_cast<char*>(p.output) + now.offset + h * half_rows + v * kVector * 4,
                words + v * kVector);
          }
        }
      }
      if (Epilogue::kEntry) entered = now.size > entered ? now.size : entered;
      now.next();
    }
    copies_wait<0>();

    RNNKERN_UNROLL
    for (int h = 0; h < halves; ++h) {
      RNNKERN_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        if (p.last && row[h] < p.batch && is_unit[v]) {
          store_words<kVector>(
              static_cast<char*>(p.last) + at_states + h * half_states + v * kVector * 4,
              state[h] + v * kVector);
        }
      }
    }
  }

  static RNNKERN_DEV void load_vectors(const void* states, int64_t at,
                                       const bool (&is_unit)[kVectors], uint32_t (&words)[kWords]) {
    RNNKERN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (is_unit[v]) {
        load_words<kVector>(static_cast<const char*>(states) + at + v * kVector * 4,
                            words + v * kVector);
      }
    }
  }

  // What a product sees of a state's word.
  static RNNKERN_DEV uint32_t factor(uint32_t word) {
    if constexpr (kBytes == 4) return Element::operand(word);
    return word;
  }
};

}  // namespace rnnkern::cuda
