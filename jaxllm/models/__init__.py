"""What a model computes: one file an architecture, made of the same layers.

decoder         Llama, Mistral, Qwen, Gemma, Phi, Mixtral: one forward pass
experts         a feed-forward part of many, of which each token reads some
grouped         the product over experts
gpt             GPT-2, minGPT, OPT and the shapes of GPT-3
t5              T5: an encoder, and a decoder that sees the source
language_model  what all of them offer beside the forward pass: type, windows, cache, stages
attention       self-attention of a chunk with what a cache holds before it
layers          linear, embedding, norms
taps            what a method sees of a forward pass, and may change
nonfinite       numbers that left their type's range: which layer was first, and what helps
stages          the way of text through a model, stage by stage
relative_bias   T5's positions: a number for each bucket of distances
rope            rotary positions and their published extensions
inputs          token ids checked, filled up and rounded up before a model reads them
linears         a model's linears by name
"""
