"""What lies on a disk: directories that appear whole, metadata, tokenizers, fingerprints.

directory     a directory that appears whole or not at all
metadata      what a file says of itself: its format, its version
manifest      a pytree of arrays as JSON that says what it is made of
fingerprint   a hash that tells a model from another
former_names  what files of earlier versions call things
tokenizer     the tokenizer of a directory
"""
