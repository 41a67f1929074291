"""Text from a model, and models that read text.

generate      prompts in, completions out: generate, stream, chat
messages      a conversation laid out by a chat template
options       what a run may be asked for
run           one batch of requests on the host: checks, shapes, texts
loop          one batch of requests on the device: the compiled loop
speculation   what speculative decoding may be asked for, and what came of it
drafts        who drafts tokens: models, the text itself
acceptance    which drafted tokens stand, and what stands in the place of others
average_bits  an average of bits a weight that the loop is held to
prefill       a text read once into a cache
text          what new tokens say: stop strings, and what is shown
sampling      from logits to a token
"""
