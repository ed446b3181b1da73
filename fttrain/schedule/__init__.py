"""In which order layers and micro-batches run: plain functions over a decoder and a store."""
