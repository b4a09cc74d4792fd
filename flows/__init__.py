"""Millrace: raw data to a verified, served model. Verbs are entry points (`python -m flows.train`), nouns library."""
