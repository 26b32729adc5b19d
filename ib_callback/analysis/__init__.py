"""What finished runs and measured models tell: the published experiments, each a function and a command."""
