"""fttrain: QLoRA fine-tuning of large language models on two consumer GPUs."""

__version__ = "0.1.0"
