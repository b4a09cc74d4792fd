"""Files for the official container image: compose, Kubernetes, and a vLLM variant of a model."""
