"""The job file, which says what the user asks for: schema, checks, reference pages."""
