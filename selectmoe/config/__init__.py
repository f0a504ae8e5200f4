"""The settings of the stages, and how they are loaded."""
