"""The recipe of the models that ship, and what it is made of.

recipe      the command that made them
card        their model cards, written from what was really run
losses      cross entropy and distillation
corpus      texts, tokenizer and batches as a function of the step
exercises   repeat, look up, add: exercises with known answers
induction   starting weights that can already copy
stories     stories in bulk from a small story model
gates       the gates that ship with the target
"""
