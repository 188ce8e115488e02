"""Commands that are killed, stopped, starved and lied to, and then run again.

`python -m tests.faults` is the long form; test_faults.py the short one.
"""
