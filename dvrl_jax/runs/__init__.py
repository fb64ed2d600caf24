"""From a command to files: configurations, run directories, checkpoints, log lines, signals."""
