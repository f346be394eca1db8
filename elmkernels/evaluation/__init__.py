"""How good is it? Log-likelihoods of texts, and the tasks of lm-eval on them.

`log_likelihoods` needs torch alone; what runs lm-eval's tasks needs the extra `eval`, and imports
it late.
"""

from .likelihood import Request, Score, log_likelihoods

__all__ = ["Request", "Score", "log_likelihoods"]
