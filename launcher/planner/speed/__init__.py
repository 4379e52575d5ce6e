"""Forecast time: operations, messages, a step, the whole job."""
