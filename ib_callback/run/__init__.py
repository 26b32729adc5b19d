"""Following a training run in any loop: when to measure, what to keep, files, loggers, checkpoints."""
