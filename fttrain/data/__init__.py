"""Data: files of records become micro-batches of token ids."""
