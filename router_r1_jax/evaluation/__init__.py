"""Evaluation: statistics of scores over questions, and what policies are compared with."""
