"""Scores samples on a server: `python -m serve`, then `python score_client.py [URL]`."""

import sys

from selectmoe.client import ScoreClient, ScoreFailure

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
SAMPLES: list[dict[str, object]] = [
    {"id": "prime", "prompt": "Name a prime.", "response": "Seven is a prime number."},
    {"id": "words", "messages": [{"role": "assistant", "content": "prime prime name prime"}]},
    {"id": "empty", "messages": []},
]

# The key of a server that has one: ScoreClient(URL, api_key=...).
with ScoreClient(URL) as client:
    for result in client.score_many(SAMPLES):
        if isinstance(result, ScoreFailure):
            print(f"{result.sample_id}: {result.error_type}: {result.error}")
        else:
            print(f"{result.sample_id}: score {result.score:.4f}, {result.num_tokens} tokens")
