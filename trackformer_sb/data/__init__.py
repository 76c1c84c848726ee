"""Music in: what is on disk, segments of it, and mixtures of mixtures.

`music` finds the songs of a folder and splits them, `audio` reads a segment of
one file, `mixtures` makes MixIT training items, `band` composes the demo
music and `synth` plays it.
"""
