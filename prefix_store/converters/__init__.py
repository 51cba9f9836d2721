"""Other tools' files to a Prefix, on the caller's own machine. Only weights are read; nothing in a file is executed."""
