"""`python -m ib_callback`: the same as `ib-callback`."""

from ib_callback.cli.main import command

command()
