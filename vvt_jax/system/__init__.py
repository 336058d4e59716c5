"""What the program needs of its surroundings: files, locks, signals, errors, the command line."""
