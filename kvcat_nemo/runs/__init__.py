"""A run's folder: its names, its checkpoints and its records. Every reader and writer of one asks here.

    layout               every name that the folder may hold, and where its files are
    checkpoint_manifest  kvcat_seal.json: size and hash of every file of a checkpoint
    integrity            is a folder complete, and what its manifest says? One answer for every reader
    checkpoints          which checkpoint does a path mean, and which of a run is the newest
    retention            which checkpoints of a run stay
    pickles              what may be in a checkpoint's pickled index
    vocabulary           which rows of an embedding are padding
    metrics_file         the figures of every step and validation
    pictures             a picture of them
    provenance           what a result was made with
    exit_codes           exit codes that say more than "failed"

No torch is imported until a function needs it: a tool can look at a checkpoint in no time, with the standard library alone.
"""
