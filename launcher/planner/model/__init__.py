"""What is known of a model before any weight is read: its config, sizes, tokens and supported layouts."""
