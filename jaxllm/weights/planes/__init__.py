"""Weights that can be read at several widths.

bit_planes        one code in planes of bits: the first few are a narrower weight
adaptive_planes   the same, each token reading as many as its input asks for
dense_widths      all widths as numbers, to fit the choice on
"""
