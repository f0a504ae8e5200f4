"""The command `selectmoe`, and what all commands share."""
