"""What the user asks for: the job file, its schema, its checks and its reference pages."""
