"""What lies on a disk: directories that appear whole, metadata, tokenizers, fingerprints.

directory     a directory that appears whole or not at all
metadata      what a file says of itself: its format, its version
manifest      a pytree of arrays as JSON that says what it is made of
checksums     what names a file that was cut, lost or changed
arrays        arrays in .npz files
orbax_files   arrays in Orbax's directories
fingerprint   a hash that tells a model from another
former_names  what files of earlier versions call things
tokenizer     the tokenizer of a directory
"""
