"""Music separation without labelled stems, for SpeechBrain and Asteroid."""

__version__ = "0.1.0"
