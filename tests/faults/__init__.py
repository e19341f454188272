"""Deliberately wrong implementations: each is the reference but for one fault, and says what the
suite must turn red.

Most were seen in real systems. A fault that the suite does not notice is a hole in the suite.
"""
