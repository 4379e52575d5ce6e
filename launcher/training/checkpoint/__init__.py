"""Checkpoints: saved, verified, resharded, imported and exported."""
