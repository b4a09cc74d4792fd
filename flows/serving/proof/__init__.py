"""The proof that what is served is what was trained, and the passport that records it."""
