"""Ray code that the stages share: the connection, tasks and training workers."""
