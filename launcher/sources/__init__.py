"""Rows of data files, as they stand there: what the planner looks at, and what the trainer prepares."""
