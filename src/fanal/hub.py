"""Files of the Hugging Face hub, through its client's cache."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from fanal.errors import FanalError

__all__ = ["fetch"]


def fetch(repository: str, files: str | Sequence[str], revision: str | None = None) -> Path:
    """Return the local path of a file of a repository, or of its folder with the files that fit some patterns.

    With `HF_HUB_OFFLINE=1`, or without a network, what is in the cache is used; `HF_ENDPOINT` names another server.

    Args:
        repository: `ORG/NAME`.
        files: the name of a file, or patterns.
        revision: branch, tag or commit; None: `main`.

    Raises:
        FanalError: huggingface_hub is missing, or the repository or the file is not to be had.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise FanalError(f"expected hub:ORG/NAME, got hub:{repository[:80]}")
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError as error:
        raise FanalError("files of the hub need huggingface_hub: pip install 'fanal[diffusers]'") from error
    try:
        if isinstance(files, str):
            return Path(hf_hub_download(repository, files, revision=revision))
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the client raises whatever the network does
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"{files} of hub:{repository}" if isinstance(files, str) else f"hub:{repository}"
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise FanalError(f"cannot fetch {what}{offline}: {reason}; is the name right, the network up?") from error
