"""Runs, from start to result, and the functions of the Python API."""
