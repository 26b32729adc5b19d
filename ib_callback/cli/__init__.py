"""The command `ib-callback`."""
