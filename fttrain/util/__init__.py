"""Errors, units, paths, locks and files, for every room."""
