"""Errors, units, paths, locks, files: what every room may use."""
