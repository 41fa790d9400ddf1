"""Facts that ship with the package; each file names its sources."""
