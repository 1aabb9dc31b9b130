"""MidiTok's tokenizers: configuration, vocabulary, grammar."""
