"""The checks of verify, a file a subject; each yields findings and changes nothing."""
