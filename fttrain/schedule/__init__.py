"""Schedules, the order of layers and micro-batches: plain functions over a decoder and a store."""
