"""Push an export to the hub as a dataset repository, in one commit."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from prefab.factory.errors import ConfigError, StoreError
from prefab.factory.extras import missing_package
from prefab.pipelines.store.export.files import OURS, listed


def push_to_hub(folder: str | Path, repository: str, private: bool = True) -> str:
    """Upload the files that the last export wrote into a folder. What an earlier push of an export
    left in the repository and is no longer written is deleted; other files are kept.

    Args:
        folder: The folder of an export.
        repository: OWNER/NAME; it is created if it does not exist.
        private: Whether a new repository is private.

    Returns: The address of the commit.

    Raises:
        ConfigError: The folder holds no export, `huggingface_hub` is not installed, or the hub
            refuses the name or the token.
        StoreError: The hub cannot be reached.
    """
    folder = Path(folder)
    files = listed(folder)
    if not files:
        raise ConfigError(f"{folder}: no export here. Write one with `prefab export {folder}`")
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise missing_package(error.name, "pushing to the hub") from error
    # the HTTP client's own errors, and OSError
    unreachable = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    api = HfApi()
    try:
        name = api.create_repo(
            repository, repo_type="dataset", private=private, exist_ok=True
        ).repo_id
        former = api.list_repo_files(name, repo_type="dataset")
        unwanted = [file for file in former if OURS.fullmatch(file) and file not in files]
        commit = api.create_commit(
            name,
            [
                *(CommitOperationAdd(file, str(folder / file)) for file in files),
                *(CommitOperationDelete(file) for file in unwanted),
            ],
            commit_message="Export of Prefab",
            repo_type="dataset",
        )
    except HFValidationError as error:
        raise ConfigError(f"{repository}: not a name of a repository: {error}") from error
    except HfHubHTTPError as error:
        raise ConfigError(f"the hub refuses {repository}: {error}") from error
    except unreachable as error:
        raise StoreError(
            f"the hub cannot be reached: {error}. The export is in {folder}; push it later with "
            f"`prefab export {folder} --push-to-hub {repository}`"
        ) from error
    return str(commit.commit_url)
