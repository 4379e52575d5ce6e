"""Tracing of a model's own class, to measure the memory of a step."""
