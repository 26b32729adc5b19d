"""Tools for all other packages: errors, checks of arguments, writing files in one step, caches, ranks, messages."""
