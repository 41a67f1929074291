"""GGUF files of llama.cpp to models and back, through tables.

checkpoint     a file to a model and back: `load`, `save`
architectures  llama.cpp's keys and ours, and what it does to tensors
container      the file: its header checked, its tensors as views, its writer
blocks         block types as fields, to weights and back bit for bit
encode         which type holds a weight
tokenizer      tokens and merges to a tokenizer and back
"""
