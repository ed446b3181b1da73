"""From files of records to micro-batches of token ids."""
