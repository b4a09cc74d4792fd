"""Python-backend models: copied into every version directory, so they import nothing of the project."""
