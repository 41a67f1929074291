"""Checkpoints that other tools quantized, as our formats.

scheme          which scheme a config.json describes, and what the schemes mean
linears         which linears of a checkpoint are quantized, and reading them
affine          GPTQ, AWQ and compressed-tensors
any_precision   Any-Precision's planes and tables, read and written
mxfp4           the experts of GPT-OSS
config          reading the blocks of a config.json
words           codes in int32 words
two_bit_words   the interleaved words of 2/4/16-bit weights
"""
