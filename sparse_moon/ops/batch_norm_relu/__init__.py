"""``batch_norm_relu``: the operator in `api`, what it computes in `reference`, and what computes it."""
