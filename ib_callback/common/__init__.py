"""What every package uses and none is about: errors, checks of arguments, files never half-written, caches."""
