"""launcher: one job file in, a plan that fits, a sharded run that survives, a model anyone can load."""

__version__ = "0.1.0"
