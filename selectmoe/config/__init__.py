"""The settings of the stages, each default once, and how they are loaded."""
