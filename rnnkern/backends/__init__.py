"""One file a backend, each with the same names; dispatch.py knows their order.

- unsupported(device, dtype, hidden_size, groups, nonlinearity) -> list[str]:
  the reasons why the backend cannot run such a call; empty: it can. Cheap, never raises.
  nonlinearity is None for linear_scan.
- rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity) -> (h, h_n)
- rnn_layer(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, nonlinearity)
  -> (h, h_n): rnn_scan of reference.project(x, ...), as fused as the backend can.
- linear_scan(u, gain, s0, weight, batch_sizes, reverse) -> s

Shapes as in reference.py; differentiable to every order; they check their arguments.
"""
