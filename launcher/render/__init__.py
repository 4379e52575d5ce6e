"""A plan as the files that others read. Pure functions; nothing is started here."""
