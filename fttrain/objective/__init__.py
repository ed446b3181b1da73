"""Objectives and evaluation metrics: functions of the target tokens' log-probabilities."""
