"""The start of the ranks on this machine. Never loads torch."""
