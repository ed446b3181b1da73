"""What strategy=deepspeed is made of: transformers' own model under DeepSpeed's ZeRO.

engine is the one page of it that imports DeepSpeed.
"""
