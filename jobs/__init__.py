"""One command per stage, which parses its options, runs the stage on Ray and reports."""
