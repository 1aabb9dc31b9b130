"""The studio: a server for a page in which one plays, listens, keeps takes, and goes on. `docs/studio-protocol.md`.

takes, store, session        the tree of takes, its file, and both behind one lock
messages                     what clients may send, checked
models, states               models by name; recurrent states, found by the music that they have read
engine                       the one thread that uses MLX, and its jobs:
making, passages, duet       new takes, passages in gaps, call and response
recording, ports, playback   what is played becomes a take; MIDI devices; a take to a MIDI output
studio                       what each message does
security, exports, server    the web application
"""
