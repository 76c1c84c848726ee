"""A local page on which to separate music and hear the sources."""
