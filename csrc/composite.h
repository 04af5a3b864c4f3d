// The ops written with one another, for the transformations that take them apart: a backward that
// is differentiated itself (autograd.cpp), vmap (vmap.cpp).
#pragma once
#include "signatures.h"

namespace rnnkern::composite {

// rnn_layer as the input product and rnn_scan.
RnnLayer rnn_layer;
// rnn_scan_backward through linear_scan, differentiable in every argument.
RnnScanBackward rnn_scan_backward;
// rnn_layer_backward as rnn_scan_backward and the products after it.
RnnLayerBackward rnn_layer_backward;

}  // namespace rnnkern::composite
