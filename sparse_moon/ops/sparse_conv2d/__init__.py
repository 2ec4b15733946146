"""``sparse_conv2d``: the operator in `api`, what it computes in `reference`, and what computes it."""
