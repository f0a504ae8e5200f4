"""One command a stage: each parses, submits to Ray, waits and reports. No maths here."""
