// Elements as they lie in words of 4 bytes: two of 16 bits, or a float.
#pragma once
#include "device.cuh"
#include "scan.h"

namespace rnnkern::cuda {

// n words, 1, 2 or 4, of a place that is a multiple of as many bytes.
template <int n>
RNNKERN_DEV void load_words(const void* from, uint32_t* words) {
  static_assert(n == 1 || n == 2 || n == 4, "words of one load");
  if constexpr (n == 1) {
    words[0] = load_global(from);
  } else if constexpr (n == 2) {
    const Words2 v = load_global2(from);
    words[0] = v.x;
    words[1] = v.y;
  } else {
    const Words4 v = load_global4(from);
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
  }
}
template <int n>
RNNKERN_DEV void store_words(void* to, const uint32_t* words) {
  static_assert(n == 1 || n == 2 || n == 4, "words of one store");
  if constexpr (n == 1) {
    store_global(to, words[0]);
  } else if constexpr (n == 2) {
    store_global2(to, {words[0], words[1]});
  } else {
    store_global4(to, {words[0], words[1], words[2], words[3]});
  }
}
template <int n>
RNNKERN_DEV void load_shared_words(uint32_t from, uint32_t* words) {
  static_assert(n == 1 || n == 2 || n == 4, "words of one load");
  if constexpr (n == 1) {
    words[0] = load_shared(from);
  } else if constexpr (n == 2) {
    const Words2 v = load_shared2(from);
    words[0] = v.x;
    words[1] = v.y;
  } else {
    const Words4 v = load_shared4(from);
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
  }
}

// n words and their 4 n / kBytes elements.
template <class Element, int n>
RNNKERN_DEV void unpack(const uint32_t* words, float* elements) {
  RNNKERN_UNROLL
  for (int i = 0; i < n; ++i) {
    if constexpr (Element::kBytes == 2) {
      Element::unpack(words[i], elements[2 * i], elements[2 * i + 1]);
    } else {
      elements[i] = number(words[i]);
    }
  }
}
template <class Element, int n>
RNNKERN_DEV void pack(const float* elements, uint32_t* words) {
  RNNKERN_UNROLL
  for (int i = 0; i < n; ++i) {
    if constexpr (Element::kBytes == 2) {
      words[i] = Element::pack(elements[2 * i], elements[2 * i + 1]);
    } else {
      words[i] = bits(elements[i]);
    }
  }
}
template <class Element>
RNNKERN_DEV float load_element(const void* from) {
  if constexpr (Element::kBytes == 2) {
    float element, none;
    Element::unpack(load_global16(from), element, none);
    return element;
  } else {
    return number(load_global(from));
  }
}

template <class Element>
RNNKERN_DEV const char* address_of(const Matrices& m, int group, int n, int k) {
  return static_cast<const char*>(m.at) +
         (group * m.stride_g + n * m.stride_n + k * m.stride_k) * Element::kBytes;
}

// What multiplies states k and up, a word's, into unit n; zero outside of the matrix. k is a
// multiple of a word's elements, and so are the strides, but for the one that is 1.
template <class Element>
RNNKERN_DEV uint32_t weight_word(const Scan& p, int group, int n, int k) {
  if (n >= p.hidden || k >= p.hidden) return 0;
  const char* at = address_of<Element>(p.weight, group, n, k);
  if constexpr (Element::kBytes == 2) {
    if (p.weight.stride_k == 1) return load_global(at);
    const uint32_t next = load_global16(at + p.weight.stride_k * Element::kBytes);
    return load_global16(at) | next << 16;
  } else {
    return Element::operand(load_global(at));
  }
}

}  // namespace rnnkern::cuda
