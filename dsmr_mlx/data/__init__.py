"""From a folder of MIDI files to a corpus on disk, and from a corpus to lanes of segments."""
