"""Whether the Hugging Face hub is there, found out without its client, which tries for long.

The variables of the environment are the client's own, and this must do without importing it: it
reads them once, when it is imported.
"""

import os
import threading
import urllib.error
import urllib.request

HUB = "https://huggingface.co"
HUB_TIMEOUT_SECONDS = 5.0


def work_offline() -> None:
    """Must come before the hub's clients are imported: they look only then."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"


def hub_answers(*, timeout_seconds: float = HUB_TIMEOUT_SECONDS) -> bool:
    """True where the hub answers anything at all; by a proxy too, if the environment names one."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    answered: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", HUB), method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=timeout_seconds).close()
        except urllib.error.HTTPError:
            pass  # an answer, too
        except (OSError, ValueError):
            return
        answered.append(True)

    # In a thread of its own: looking up a name knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return bool(answered)
