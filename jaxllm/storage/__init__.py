"""What lies on a disk: directories that appear whole, manifests, tokenizers, fingerprints.

directory     a directory that appears whole or not at all
manifest      a pytree of arrays as JSON that says what it is made of
fingerprint   a hash that tells a model from another
tokenizer     the tokenizer of a directory
"""
