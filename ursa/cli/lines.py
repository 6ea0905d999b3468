"""Lines on the terminal that hold texts of others."""

from ursa.texts import printable


def print_lines(*lines: object) -> None:
    """Print lines, each as one line that says nothing to the terminal.

    Args:
        *lines: Such as the name of a file, whoever has named it.
    """
    for line in lines:
        print(printable(line), flush=True)
