"""`raybert push`: a model directory becomes a repository of huggingface.co, or of `HF_ENDPOINT`.

huggingface_hub finds the token, `HF_TOKEN` or that of `hf auth login`; raybert never reads more
of it than whether there is one.
"""

from __future__ import annotations

from typing import Any

from raybert.errors import UserError, one_line
from raybert.model import huggingface
from raybert.storage.folder import Folder
from raybert.storage.registry import is_hub_name
from raybert.terminal.display import Display

_FORBIDDEN = (401, 403)


def push(
    model: Folder, name: str, display: Display, *, public: bool, dry_run: bool
) -> dict[str, Any]:
    """Upload all files of a model directory in one commit; a new repository is private by default.

    Raises:
        UserError: the name, the token or its rights, the network, or a public repository without
            `public`.
    """
    if name.count("/") != 1 or not is_hub_name(name):
        raise UserError(f"push to {name}: a repository is named OWNER/NAME, as me/my-model")
    huggingface.check_weights(model)
    sizes = {file: size for file, size in sorted(model.sizes().items()) if file in model.names()}
    result = {"repository": name, "public": public, "files": sizes, "url": None}
    if dry_run:
        return result
    try:
        from huggingface_hub import CommitOperationAdd, HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UserError("push needs huggingface_hub; pip install 'raybert[hub]'") from None
    token = get_token()
    if token is None or not (token.isascii() and token.isprintable()):  # no header may have others
        has = "no token" if token is None else "the token has characters that no token has"
        raise UserError(
            f"push to {name}: {has}; set HF_TOKEN to one that may write, or run `hf auth login`"
        )
    hub = HfApi()
    try:
        with display.stage("push"):
            display.progress(f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB")
            hub.create_repo(name, private=not public, exist_ok=True)
            if not public and hub.model_info(name).private is False:
                raise UserError(
                    f"push to {name}: the repository is public; give --public to upload there"
                )
            files = [
                CommitOperationAdd(file, model.join(file) if model.is_local else data)
                for file in sizes
                for data in [b"" if model.is_local else model.read_bytes(file)]
            ]
            hub.create_commit(name, files, commit_message="Upload a model of raybert")
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in _FORBIDDEN:
            raise UserError(
                f"push to {name}: the token is not valid or may not write there "
                f"({error.response.status_code}); make one with the right to write"
            ) from None
        raise UserError(f"push to {name}: {hub.endpoint} answers: {one_line(error)}") from None
    except UserError:
        raise
    except Exception as error:  # of its HTTP client, of the network, of the hub's answers
        raise UserError(
            f"push to {name}: {hub.endpoint} did not take it ({one_line(error)}); check the "
            "network and HF_ENDPOINT"
        ) from None
    return {**result, "url": f"{hub.endpoint}/{name}"}


def format_push(result: dict[str, Any]) -> str:
    """The files with their sizes, and where they are."""
    lines = [f"{size:>14,}  {file}" for file, size in result["files"].items()]
    access = "public" if result["public"] else "private"
    where = result["url"] or f"Not uploaded: --dry-run. Would go to {result['repository']}"
    return "\n".join([*lines, f"{where} ({access})"])
