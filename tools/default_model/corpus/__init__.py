"""The training text: dialogues of a small closed world, one module a domain, drawn without end."""
