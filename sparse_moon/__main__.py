"""``python -m sparse_moon`` is ``sparse-moon``."""

from sparse_moon.cli import main

main()
