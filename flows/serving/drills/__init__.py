"""Faults on purpose, under load: malformed requests, dead and hung servers, storms of promotions."""
