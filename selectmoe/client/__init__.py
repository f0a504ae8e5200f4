"""Clients of a score server (`python -m serve`): ScoreClient, and AsyncScoreClient.

>>> with ScoreClient("http://127.0.0.1:8000") as client:
...     client.score({"prompt": "Why is the sky blue?", "response": "Air scatters blue."}).score
0.73

They need httpx, the extra `client`.
"""

from selectmoe.client.requests import ScoreFailure, ScoreResult, ServerInfo, TokenScore
from selectmoe.client.score_client import AsyncScoreClient, ScoreClient

__all__ = [
    "AsyncScoreClient",
    "ScoreClient",
    "ScoreFailure",
    "ScoreResult",
    "ServerInfo",
    "TokenScore",
]
