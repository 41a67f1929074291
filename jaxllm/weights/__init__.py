"""How a weight is stored, one file a format, and the one product with it.

    weight          what every format has and holds: the contract
    matmul          the product with a weight of any format; which formats exist
    dense           every number as it is
    affine          (code - zero_point) * scale by group
    block_affine    codes * scale + offset, both in codes by blocks (GGUF)
    codebook        a table of levels an output
    planes/         planes of bits, to be read at several widths (Any-Precision, DP-LLM)
    scaled          another format, its inputs scaled (AWQ)
    mixed_columns   2- and 4-bit columns, single weights at 16 bits
    sparse          another format, and single weights kept apart as they were (dense and sparse)
    nested_float    a float16 whose upper byte is a float8 (NestedFP)
    experts         the weights of several experts as one, in any other format
    host_residual   a base, and residual rows from host memory (DecDEC)
    permuted        another format whose inputs stand in another order
    rotated         another format in a rotated basis, activations of 4 or 8 bits

Letters: K inputs, N outputs, G groups. A weight's shape is (K, N) and y = x @ w; rows are its [N, K].
"""
