"""One command per stage: each parses, submits to Ray, waits and reports. No maths here."""
