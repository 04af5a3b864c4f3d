"""One file a backend, each with the same names; dispatch.py knows their order.

unsupported(device, dtype, hidden_size, groups, nonlinearity) -> list[str]
    the reasons why the backend cannot run such a call; empty: it can. Cheap, never raises.
    nonlinearity is None for linear_scan.
rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity) -> (h, h_n)
linear_scan(u, gain, s0, weight, batch_sizes, reverse) -> s
    shapes as in reference.py; differentiable to every order; check their arguments.
"""
