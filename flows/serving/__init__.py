"""The model repository, the inference server, and the proof that what is served is what was trained."""
