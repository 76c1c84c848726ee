"""Files of models: of a local folder, or of the hub, checked."""

import hashlib
import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.errors import HTTPError

# A hub id is owner/name. Anything else that is no folder is a mistyped one.
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _a(what):
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


def model_file(
    source,
    filename,
    what="separator",
    revision=None,
    token=None,
    cache_dir=None,
    local_files_only=False,
    force_download=False,
):
    """The local path of one file of a model.

    Arguments
    ---------
    source : str or Path
        Folder, or id on the hub.
    filename : str
        Name of the file in it.
    what : str
        What the folder holds, for messages.
    revision : str, optional
        Branch, tag or commit on the hub.
    token : str or bool, optional
        Of an account on the hub; by default the one that is logged in.
    cache_dir : str or Path, optional
        Where files of the hub are kept.
    local_files_only : bool
        Whether to use what is in the cache and no network.
    force_download : bool
        Whether to download what is in the cache again.

    Returns
    -------
    Path
        The file; a local one stays where it is, one of the hub is in the
        cache and is what the hub announced.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, model, revision or file.
    OSError
        If the hub cannot be reached or refuses, or the download was
        interrupted or is broken. What is broken does not stay in the cache.
    """
    source = os.fspath(source)
    if Path(source).is_dir():
        path = Path(source) / filename
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} not found: expected {_a(what)} folder with "
                f"{filename} beside its other files, as training writes it"
            )
        return path
    if not HUB_ID.fullmatch(source) or Path(source).parent.is_dir():
        raise FileNotFoundError(
            f"{source} not found: expected {_a(what)} folder with "
            f"{filename}, or the owner/name of a model on the hub"
        )
    try:
        path = huggingface_hub.hf_hub_download(
            source,
            filename,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        _check_hash(path)
    except (HTTPError, OSError, ValueError) as error:
        kind, reason = _reason(error, filename, revision)
        raise kind(
            f"{source} is no folder, and as a model on the hub it could not "
            f"be fetched: {reason}"
        ) from error
    return Path(path)


def _reason(error, filename, revision):
    """What a failed download means: a kind of error and words for it."""
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = error.__cause__
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return _reason(cause, filename, revision)
        if isinstance(cause, errors.FileMetadataError):
            return OSError, (
                "what answers is no model hub; check HF_ENDPOINT and proxies"
            )
        if cause is None:
            return FileNotFoundError, (
                f"{filename} is not in the cache, and the network is not used"
            )
        return FileNotFoundError, (
            f"{filename} is not in the cache, and the hub cannot be reached "
            f"({_first_line(cause)})"
        )
    if isinstance(error, errors.GatedRepoError):
        return PermissionError, (
            "its owner has to grant access first; then log in or give a token"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError, (
            "there is no such model, or it is private: log in or give the "
            "token of an account that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError, f"it has no revision {revision}"
    if isinstance(error, errors.EntryNotFoundError):
        return FileNotFoundError, f"it has no {filename}"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return PermissionError, (
                f"access refused ({status}): log in or give the token of an "
                "account that may read it"
            )
        return OSError, f"the hub answered {status} for {filename}"
    if isinstance(error, errors.HFValidationError):
        return FileNotFoundError, _first_line(error)
    return OSError, (
        f"the download of {filename} failed, try again ({_first_line(error)})"
    )


def _first_line(error):
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _check_hash(path):
    """Refuses, and removes from the cache, what the hub did not announce.

    The cache names a file by what the hub says of it: the SHA-256 of a large
    file, git's SHA-1 of a small one. The client compares sizes only.
    """
    if not os.path.islink(path):
        return  # a file system without links: the name is lost
    blob = os.path.join(os.path.dirname(path), os.readlink(path))
    announced = os.path.basename(blob)
    if len(announced) == 64:
        digest = hashlib.sha256()
    elif len(announced) == 40:
        digest = hashlib.sha1(b"blob %d\0" % os.path.getsize(path))
    else:
        return
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != announced:
        os.unlink(path)
        os.unlink(blob)
        raise OSError(f"expected hash {announced}, got {digest.hexdigest()}")
