"""``sparse_mlp``: the operator in `api`, its parts by other operators in `parts`, and what a GPU runs in `gpu`."""
