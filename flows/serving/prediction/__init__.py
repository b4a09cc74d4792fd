"""Answers to all rows of a file, from one server or several."""
