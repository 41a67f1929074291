"""Measures of a model: perplexity of texts, accuracy on multiple choice, bytes.

perplexity   log-probabilities and perplexity of texts
choices      multiple choice by log-likelihood
report       bytes and bits per weight, by layer and in all
lm_eval      EleutherAI's harness on our models (extra `eval`; imported by itself)
"""

from jaxllm.measure.choices import TASKS, Choices, score_choices
from jaxllm.measure.perplexity import Perplexity, Scores, perplexity, score
from jaxllm.measure.report import Report, report_bytes

__all__ = [
    "TASKS",
    "Choices",
    "Perplexity",
    "Report",
    "Scores",
    "perplexity",
    "report_bytes",
    "score",
    "score_choices",
]
