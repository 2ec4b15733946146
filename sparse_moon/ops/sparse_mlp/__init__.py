"""``sparse_mlp``: the operator in `api`, its parts by other operators in `parts`, and by kernels in `cpu` and `gpu`."""
