"""MidiTok tokenizers: settings, vocabulary, grammar."""
