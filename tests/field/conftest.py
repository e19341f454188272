"""The bindings of other libraries are imported in those libraries' environments alone."""

collect_ignore = ["bindings"]
