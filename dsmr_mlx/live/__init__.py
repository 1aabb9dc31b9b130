"""Playing together live: a human and the model take turns at one keyboard and share one recurrent state.

    ports, network, sources      inputs and outputs: devices, TCP, MIDI files, the Enter key
    midi_bytes                   MIDI messages from a byte stream
    clock                        real and virtual clocks, and the event queue
    hands, transcript            the human's keys, and the stream of events made from them
    note_transcript              the same in Aria's vocabulary, which writes a note when its length is known
    reply, scheduler             what the model plans to play, sent at its times
    key_reply, note_reply        replies in either kind of vocabulary; vocabularies chooses one
    instrument                   output that tracks pressed keys and releases them all on close
    session                      the turns
    recorder, statistics         the recording and the measurements

The recurrent state contains exactly what has sounded, and notes that came too late to be sent. The model plays ahead of
time; when the human plays again, the model's keys go up at once and the notes that have not sounded are rewound.
Silence counts as time in the stream too.

In Aria's vocabulary a note is one event with its length. The human's notes are read when their keys go up, in the order
of onsets, five seconds late at most; keys that are down when the turn passes get the lengths that the model expects.
When the human interrupts, the player rewinds to the first note of the model that still sounds, and reads the notes
again with the lengths that sounded.

Late notes: up to `LiveOptions.max_late` seconds they are sent at once, later ones are dropped with their note-offs; the
notes that follow keep their times. If the model falls behind by more than `LiveOptions.max_behind`, it skips to the
present, with a head start as long as its first note took to compute. The clock ends a turn that the model is too slow
to end.

No key stays down: all output goes through the instrument, which tracks pressed keys and can be closed at any time. A
signal or a lost port does not interrupt code: it ends the session at the next event, in `Session._close`, where
note-offs that could not be sent are tried again.

Only the thread that runs the session uses MLX.
"""
