"""Settings of the papers, as YAML files for ``sparse-moon train --config``."""
