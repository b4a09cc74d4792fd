"""What every served version carries a copy of: models of the python backend, so it imports nothing of the project."""
