"""The decoder and its Hugging Face checkpoints."""
