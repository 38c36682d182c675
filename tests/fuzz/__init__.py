"""Fuzz: files as strangers could give them, spoilt by chance, for everything here that reads one.

    python -m tests.fuzz --inputs 50000 --seed 1
    python -m tests.fuzz --inputs 2000 --targets config gguf

Whatever comes in, a reader may do two things: read it, or say what is wrong with it (a `UserError`,
a `DataError`, a `WorkError`, or a list of problems). Any other exception, and any input that takes
longer than two seconds or more memory than is allowed, is a fault: its files are saved, and the
exit code is 1. The same seed gives the same inputs.

`mutation` spoils files, `targets_*` say which files are read by what, `trial` tries an input.
"""
