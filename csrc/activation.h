// The activations: f, and f' FROM ITS OUTPUT h = f(a), so that h is all that a layer must save.
//
// Each formula is written once, over a Math that supplies the primitives for its value type:
// vectors (cpu/vec_math.h), tensors (rows.cpp), device scalars. To add one: a functor, a line in
// with_activation, a name.
#pragma once

namespace rnnkern {

enum class Activation { kTanh, kRelu, kSigmoid, kSoftplus, kIdentity };

// In the order of the enum.
constexpr const char* kActivationNames[] = {"tanh", "relu", "sigmoid", "softplus", "identity"};

#ifdef __CUDACC__
#define RNNKERN_ANYWHERE __host__ __device__
#define RNNKERN_FN static RNNKERN_ANYWHERE __forceinline__
#else
#define RNNKERN_ANYWHERE
#define RNNKERN_FN static inline __attribute__((always_inline))
#endif

template <class Math>
struct Tanh {
  template <class V>
  RNNKERN_FN V f(const V& a) {
    return Math::tanh(a);
  }
  template <class V>
  RNNKERN_FN V df(const V& h) {
    return Math::one(h) - h * h;
  }
};

template <class Math>
struct Relu {
  template <class V>
  RNNKERN_FN V f(const V& a) {
    return Math::relu(a);
  }
  template <class V>
  RNNKERN_FN V df(const V& h) {
    return Math::step(h);
  }
};

template <class Math>
struct Sigmoid {
  template <class V>
  RNNKERN_FN V f(const V& a) {
    return Math::sigmoid(a);
  }
  template <class V>
  RNNKERN_FN V df(const V& h) {
    return h * (Math::one(h) - h);
  }
};

template <class Math>
struct Softplus {
  template <class V>
  RNNKERN_FN V f(const V& a) {
    return Math::softplus(a);
  }
  template <class V>
  RNNKERN_FN V df(const V& h) {
    return -Math::expm1(-h);
  }
};

template <class Math>
struct Identity {
  template <class V>
  RNNKERN_FN V f(const V& a) {
    return a;
  }
  template <class V>
  RNNKERN_FN V df(const V& h) {
    return Math::one(h);
  }
};

// Calls visit(functor) with the functor that `activation` names.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // visit may be the device's alone
#endif
template <class Math, class Visit>
RNNKERN_ANYWHERE inline auto with_activation(Activation activation, Visit&& visit) {
  switch (activation) {
    case Activation::kRelu:
      return visit(Relu<Math>{});
    case Activation::kSigmoid:
      return visit(Sigmoid<Math>{});
    case Activation::kSoftplus:
      return visit(Softplus<Math>{});
    case Activation::kIdentity:
      return visit(Identity<Math>{});
    case Activation::kTanh:
      break;
  }
  return visit(Tanh<Math>{});
}

}  // namespace rnnkern
