"""Musical metrics: what is to be said of generated music, by itself and beside real music.

features.py     what can be counted in a piece: histograms and figures, of `midi.Notes`
comparison.py   two sets of pieces: overlaps, divergences, distances
syntax.py       faults of a stream of ids
music.py        the files, and excerpts of the reference as long as they are
report.py       `assess`, which brings all that together
plot.py         the distributions as a picture
"""
