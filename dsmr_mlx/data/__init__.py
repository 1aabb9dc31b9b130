"""Prepare a folder of MIDI files as a corpus, and read a corpus in lanes of segments."""
