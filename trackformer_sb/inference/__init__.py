"""Separators in use: separation, long files, export, the hub class."""
