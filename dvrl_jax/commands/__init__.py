"""The console commands, a module each: flags, `main`, and `run` for the entry point."""
