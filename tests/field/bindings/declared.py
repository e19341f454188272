"""Expected failures as a binding declares them, written by reason."""


def failures(file, *groups):
    """Each group is a reason, its place, and lines of a requirement, a property and its strategies.

    ``R20.3 the_merge_of_one_card_is_that_card ties dare`` stands for two.
    """
    declared = {}
    for reason, place, lines in groups:
        for line in lines.strip().splitlines():
            requirement, name, *strategies = line.split()
            for suffix in [f"[{strategy}]" for strategy in strategies] or [""]:
                test = f"{file}::test_{name}{suffix}"
                declared.setdefault(requirement, {})[test] = (reason, place)
    return declared
