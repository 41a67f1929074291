"""One family of Hugging Face checkpoints a table: how its config reads, which tensor is which leaf.

family       what describes a family
llama_line   Llama, Mistral, Qwen, Gemma, Phi
experts      Mixtral, Qwen 3 MoE, GPT-OSS
gpt          GPT-2, OPT
t5           T5
rope         rotary positions in a config, read and written
"""
