"""What clients outside may reach: a guard before the inference server, and an interface like OpenAI's."""
