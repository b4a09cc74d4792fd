"""Candidates to runnable ONNX programs."""
