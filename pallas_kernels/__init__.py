"""Kernels for NVIDIA GPUs, one folder an operation: meaning (reference), speed (kernel), choice (`__init__`).

No operation has landed yet; this package holds the rule they will share. Each takes plain arrays, so it can
be lifted out alone, and imports nothing of jaxllm.
"""
