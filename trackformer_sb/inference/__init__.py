"""Separators in use: the separator, long files, SpeechBrain's interface."""
