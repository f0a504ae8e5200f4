"""Uploads a model folder to a repository of the Hugging Face Hub."""

from pathlib import Path

from selectmoe.errors import ConfigError, ModelError, first_line
from selectmoe.model.hub_access import hub_answers


def require_hub_login(name: str) -> None:
    """Raises ConfigError, before anything is converted, where the upload could not succeed."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub must be NAME or OWNER/NAME: {first_line(error)}") from error
    if get_token() is None:
        raise ConfigError(
            "push_to_hub needs a token of the Hugging Face Hub with write access: run "
            "'hf auth login' or set HF_TOKEN"
        )
    if not hub_answers():
        raise ConfigError(
            f"push_to_hub {name}: the Hugging Face Hub does not answer or HF_HUB_OFFLINE is set"
        )


def push_folder(folder: Path, name: str) -> str:
    """Uploads all files of a folder in one commit; returns the address of the repository, which is
    created as a private one if it does not exist.

    Raises ModelError where the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message="Upload a Select-MoE model",
        )
    except Exception as error:  # the client's HTTP library, and so its errors, change by version
        raise ModelError(
            f"{folder} is complete, but could not be uploaded to {name}: {first_line(error)}"
        ) from error
    return str(repository)
