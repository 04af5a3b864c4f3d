// Calls to the ops through the dispatcher.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

#include "signatures.h"

namespace rnnkern::ops {

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

template <class... Args>
auto rnn_scan(Args&&... args) {
  static const auto op = find<RnnScan>("rnnkern::rnn_scan");
  return op.call(std::forward<Args>(args)...);
}

template <class... Args>
auto rnn_layer(Args&&... args) {
  static const auto op = find<RnnLayer>("rnnkern::rnn_layer");
  return op.call(std::forward<Args>(args)...);
}

template <class... Args>
auto rnn_scan_backward(Args&&... args) {
  static const auto op = find<RnnScanBackward>("rnnkern::rnn_scan_backward");
  return op.call(std::forward<Args>(args)...);
}

template <class... Args>
auto rnn_layer_backward(Args&&... args) {
  static const auto op = find<RnnLayerBackward>("rnnkern::rnn_layer_backward");
  return op.call(std::forward<Args>(args)...);
}

template <class... Args>
auto linear_scan(Args&&... args) {
  static const auto op = find<LinearScan>("rnnkern::linear_scan");
  return op.call(std::forward<Args>(args)...);
}

template <class... Args>
auto rnn_scan_int8(Args&&... args) {
  static const auto op = find<RnnScanInt8>("rnnkern::rnn_scan_int8");
  return op.call(std::forward<Args>(args)...);
}

}  // namespace rnnkern::ops
