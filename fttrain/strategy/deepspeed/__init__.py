"""strategy=deepspeed: transformers' model under DeepSpeed's ZeRO.

The builder loads ``page`` on demand. engine and partitions import DeepSpeed.
"""
