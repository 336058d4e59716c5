"""Model folders on the Hugging Face Hub, at `hf://organisation/name` or `hf://.../name@revision`."""

from pathlib import Path

from vvt_jax.weights.checks import WeightsError

PREFIX = "hf://"


def fetch(address: str, files: tuple[str, ...]) -> Path:
    """Return the local folder of a Hub repository, downloaded if huggingface_hub has not cached it.

    Args:
        address: `hf://organisation/name`, followed by `@` and a branch, tag or commit if it is not
            the newest revision.
        files: the files to fetch; no others are downloaded.

    Raises:
        WeightsError: huggingface_hub isn't installed, the address is malformed, or the repository
            can't be fetched.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise WeightsError(
            f"{address} needs huggingface_hub: pip install 'vvt-jax[hub]'."
        ) from error
    repository, at, revision = address.removeprefix(PREFIX).partition("@")
    if repository.count("/") != 1 or (at and not revision):
        raise WeightsError(
            f"{address} is no address: it has to be hf://organisation/name@revision."
        )
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(files)
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        # These include LocalEntryNotFoundError: offline, and not in the cache
        reason = str(error).strip().partition("\n")[0][:200].rstrip(".")
        raise WeightsError(f"{address} can't be fetched: {reason}.") from error
    return Path(folder)
