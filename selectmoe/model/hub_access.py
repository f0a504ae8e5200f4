"""Checks within seconds whether the Hugging Face hub answers; its client would retry for longer.

The environment variables are the client's own. The client must not be imported here: it reads them
once, at import.
"""

import os
import threading
import urllib.error
import urllib.request

HUB = "https://huggingface.co"
HUB_TIMEOUT_SECONDS = 5.0


def work_offline() -> None:
    """Must be called before the hub's clients are imported: they read the variables only then."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"


def hub_answers(*, timeout_seconds: float = HUB_TIMEOUT_SECONDS) -> bool:
    """True if the hub answers at all, also through the proxy that the environment names."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    answered: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", HUB), method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=timeout_seconds).close()
        except urllib.error.HTTPError:
            pass  # an answer too
        except (OSError, ValueError):
            return
        answered.append(True)

    # In a thread: a DNS lookup has no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return bool(answered)
