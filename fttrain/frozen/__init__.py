"""The frozen base: its source, its quantisation, and its cache on disk."""
