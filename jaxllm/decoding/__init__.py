"""Text from a model, and models that read text.

generate      prompts in, completions out: generate, stream, chat
messages      a conversation laid out by a chat template
options       what a run may be asked for
run           one batch of requests on the host: checks, shapes, texts
loop          one batch of requests on the device: the compiled loop
average_bits  an average of bits a weight that the loop is held to
prefill       a text read once into a cache
text          what new tokens say: stop strings, and what is shown
sampling      from logits to a token
"""
