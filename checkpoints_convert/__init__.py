"""Other people's files to our models and back: tables of names, and one loop.

huggingface        Hugging Face directories to models and back
build_model        a family's table, a config, tensors: one loop to a model
materialize        a model filled leaf by leaf, straight to its sharding
tensor_files       safetensors as views of the mapped file
pickle_files       torch's pickled files, of which nothing is run
json_fields        JSON files read with care, each key of the kind that it must be
llama2c            llama2.c's files of weights
llama2c_tokenizer  llama2.c's tokenizer
mingpt             minGPT's json
qwix               affine weights to qwix arrays and back
families/          one table a family
gguf/              GGUF files of llama.cpp
quantized/         GPTQ, AWQ, compressed-tensors and Any-Precision checkpoints
"""
