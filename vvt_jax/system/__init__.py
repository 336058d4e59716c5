"""Interfaces to the operating system: files, locks, signals, errors and the command line."""
