"""Evaluation of policies: answering questions, records of episodes, metrics with intervals, comparisons."""
