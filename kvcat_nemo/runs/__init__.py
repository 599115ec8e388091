"""A run's checkpoints and other folders with a manifest: what belongs to them, and whether they are complete and whole.

    manifest      kvcat_seal.json: size and hash of every file
    standing      is a folder complete and whole? One answer for every reader
    checkpoints   which checkpoint does a path mean, and which of a run is the newest
    keep          which checkpoints of a run stay
    pickles       what may be in a checkpoint's pickled index
    vocabulary    which rows of an embedding are padding

No torch is imported: a tool can look at a checkpoint in no time, with the standard library alone.
"""
