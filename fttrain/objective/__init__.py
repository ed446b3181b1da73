"""Objectives: the loss of a micro-batch as a function of its targets' log-probabilities."""
