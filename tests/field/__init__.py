"""The field: the conformance suite held against libraries that people use, `make field`."""
