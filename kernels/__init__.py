"""Triton-language kernels with plain-torch references; imports torch and triton only."""
