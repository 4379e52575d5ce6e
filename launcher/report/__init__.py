"""An HTML page that reports on runs to people who did not watch them, made from their directories alone."""
