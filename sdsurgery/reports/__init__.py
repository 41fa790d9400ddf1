"""Plain data rendered: for terminals and as JSON."""
