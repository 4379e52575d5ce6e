"""The demo: a small real model, real text, and the whole journey from a job file to an answer."""
