"""Music separation without labelled stems, for SpeechBrain and Asteroid."""

__version__ = "0.2.0"
