"""The matrix of attacks and defences, cell by cell."""
