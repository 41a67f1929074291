"""Checkpoints that other tools quantized, as our formats, and ours as theirs.

scheme          which scheme a config.json describes, and what the schemes mean
linears         which linears of a checkpoint are quantized, and reading them
export          which linears of a model are written, and how; rounding what a scheme cannot hold
affine          linears in affine codes, what the next three share
gptq            GPTQ's words, zeros and order, and its settings by module
awq             AWQ's words
compressed_tensors  compressed-tensors' words, and its settings by target
any_precision   Any-Precision's planes and tables, read and written
sparse_rows     single weights beside these, by outputs
mxfp4           the experts of GPT-OSS
config          reading the blocks of a config.json
words           codes in int32 words
two_bit_words   the interleaved words of 2/4/16-bit weights
"""
