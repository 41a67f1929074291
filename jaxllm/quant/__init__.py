"""How weights are stored: one module a format, and `matmul`, which knows them all."""
