"""The files in which other tools read a plan. Pure functions; nothing is started here."""
