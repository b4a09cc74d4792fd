"""One DeepSpeed training loop for every objective."""
