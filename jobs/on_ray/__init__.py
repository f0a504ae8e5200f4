"""What the stages share on Ray: a session, tasks and training workers."""
