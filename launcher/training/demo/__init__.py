"""The demo: a small real model and real text, from a job file to an answer."""
