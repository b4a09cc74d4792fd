"""Which version is live, and every change of it: promote, canary, rollback, and what watches them."""
