"""The command `selectmoe`, and code that all commands share."""
