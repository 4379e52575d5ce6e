"""Load a model: its class, config, adapters, attention, and a check of its loss."""
