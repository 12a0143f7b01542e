"""One model in one process: load it, generate, and die with the supervisor."""
