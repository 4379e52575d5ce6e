"""Rows of data files, which the planner samples and the trainer prepares."""
