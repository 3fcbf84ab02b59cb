"""What a checkpoint that cannot be served raises."""

MAX_PART_CHARS = 300


def one_line(value: object) -> str:
    """`value` as printable text without line breaks, cut to `MAX_PART_CHARS`.

    The parts of a message come from files that nobody vouches for.
    """
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return text if len(text) <= MAX_PART_CHARS else text[: MAX_PART_CHARS - 3] + "..."


class CheckpointError(Exception):
    """A checkpoint folder is damaged, incomplete or of a kind that is not supported.

    `str()` is one line: file, tensor, what was expected, what was found, what to do about it.
    The arguments stay positional so that the exception survives pickling between processes.
    """

    def __init__(
        self,
        file: object,
        expected: object,
        found: object,
        tensor: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(str(file), str(expected), str(found), tensor, hint)
        self.file = str(file)
        self.expected = one_line(expected)
        self.found = one_line(found)
        self.tensor = tensor
        self.hint = hint

    def __str__(self) -> str:
        tensor = f"tensor {one_line(self.tensor)}: " if self.tensor else ""
        hint = f" ({one_line(self.hint)})" if self.hint else ""
        return f"{one_line(self.file)}: {tensor}expected {self.expected}, found {self.found}{hint}"
