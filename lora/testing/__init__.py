"""The conformance kit: a binding, strategies, tolerances and a pytest plugin, for this library and
any other.
"""
