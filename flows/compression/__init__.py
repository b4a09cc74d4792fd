"""Models made smaller: stored small and run small."""
