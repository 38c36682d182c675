"""Runs that are killed, torn and starved, and must end as if nothing had happened.

    python -m tests.faults soak --rounds 60        kills at random moments, in every phase
    python -m tests.faults operations              each file operation fails, is torn, kills

Both print what was hit and how often, and exit with 1 if a single run did not end bit-identical.
A subset runs with the tests (`test_faults.py`).
"""
