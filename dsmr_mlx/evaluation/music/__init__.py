"""Musical metrics: what is to be said of generated music, by itself and beside real music.

features.py     what can be counted in a piece: histograms and figures, of `midi.Notes`
comparison.py   two sets of pieces: overlaps, divergences, distances
syntax.py       faults of a stream of ids
music.py        the files, and excerpts of the reference as long as they are
shared_runs.py  the longest runs of events that two sets of music have in common
copies.py       those that files share with what a model was trained on
report.py       `assess`, which brings all that together
plot.py         the distributions as a picture
"""
