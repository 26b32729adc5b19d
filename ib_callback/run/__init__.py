"""Following a run of training, whatever the loop: when to measure, what to keep, files, loggers, checkpoints."""
