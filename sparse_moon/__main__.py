"""``python -m sparse_moon`` is ``sparse-moon``."""

from sparse_moon.app.cli import main

main()
