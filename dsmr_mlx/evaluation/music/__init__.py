"""Musical metrics: generated music alone and compared with real music.

features.py       histograms and figures of a piece
distances.py      comparison of two sets of pieces: overlaps, divergences, distances
discriminator.py  how well a classifier tells two sets apart
syntax.py         syntax errors in a stream of ids
sets.py           the generated files, and excerpts of the reference of the same lengths
shared_runs.py    the longest runs of events that two sets of music share
copies.py         the longest runs that files share with the training music
assess.py         `assess`, which combines all of these
plot.py           the distributions as a picture
"""
