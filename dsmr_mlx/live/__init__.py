"""Playing together: a human and the model take turns at one keyboard, and share one recurrent state.

    ports, network, sources      where music comes from and goes to; threads of theirs receive and send, no more
    midi_bytes                   messages from a stream of bytes
    clock                        real or virtual time, and the one box that everything which happens is put into
    hands, transcript            what the human's hands do, as tokens, while they do it
    reply, scheduler             what the model is about to play, and its keys, sent at their times
    instrument                   an output on which no key is struck twice or left down
    session                      the turns, and what has to be right at the end
    recorder, statistics         what is kept

The state hears what was heard. The model plays ahead of time; when the human plays again, its keys go up at once, and
what was not heard yet is taken back. Time in which nobody plays is time in the tokens too.

Notes that come late: up to `LiveOptions.latest` seconds they are struck at once, later ones are left out together with
their release; what follows keeps its place in time. If the model falls behind by more than `LiveOptions.patience`, it
goes on from now, with the head start that its first note took before; the clock ends a turn that it is too slow to end.

No key stays down. All that is sent goes through the instrument, which knows what is down and may be closed at any time.
A signal or a lost port interrupts nothing: it says that the session is over, which `Session.run` sees before it looks
at anything else, and which ends, as all does there, in `Session._close`. What could not be sent is tried again there.

MLX is used by the thread that runs the session, and by no other.
"""
