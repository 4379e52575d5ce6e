"""Trace a model's own class to measure what a step of it keeps in memory."""
