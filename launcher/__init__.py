"""Fine-tune Hugging Face models that are sharded over GPUs: one job file in, a model out."""

__version__ = "0.1.0"
