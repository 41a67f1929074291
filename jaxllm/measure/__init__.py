"""Measures of a model: perplexity of texts, accuracy on multiple choice, bytes.

`jaxllm.measure.lm_eval` (the `eval` extra) is imported by itself.
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
