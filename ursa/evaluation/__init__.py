"""Evaluation: what a model does on clips it never saw. Metrics and commands: docs/evaluation.md."""

from ursa.evaluation.step import evaluate

__all__ = ["evaluate"]
