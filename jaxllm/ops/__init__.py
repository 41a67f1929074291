"""Functions on plain arrays, of no model and no format.

attention   attention over keys and values at hand, in jnp
batches     a function of one row for some rows at once, a program of some rows for many
gather      some slices of an array, or of packed codes
hadamard    fast orthogonal transforms of any size
packing     codes of 1 to 8 bits in 32-bit words
search      the better of two candidates
"""
