"""Every candidate measured alike, and the gates between a candidate and its publication."""
