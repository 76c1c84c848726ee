"""Music in: what is on disk, segments of it, and mixtures of mixtures.

`music` finds the songs of a folder and splits them, `mixtures` and `remix` make
training items, `shards` packs them, `band` composes the demo music and
`make_music` renders more.
"""
