"""Runs that are stopped, damaged and starved, and must end as if nothing had happened.

    python -m tests.faults soak --rounds 60      stopped at random moments, in every phase and way
    python -m tests.faults operations --rotate   each file operation fails, is torn, or is the last
    python -m tests.faults damage --rounds 60    checkpoints are damaged between two starts
    python -m tests.faults full --rounds 64      full disks, limits of size, read-only folders
    python -m tests.faults memory --rounds 12    killed by the system for want of memory

Several may be named at once. Each prints what was hit and how often, and the exit code is 1 if a
single run did not end as an undisturbed one: exported weights bit for bit, checkpoints with their
optimizer, metrics, TensorBoard, samples, names of files. `full` needs Linux and the right to mount
in a name space of its own, `memory` a control group. A subset runs with the tests.
"""
