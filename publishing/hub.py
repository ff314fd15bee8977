"""Upload of a folder to the Hugging Face hub, through huggingface_hub.

The login comes from the usual places (HF_TOKEN, or `hf auth login`) and is never shown. A second
try goes on where the first one stopped: what the hub has already is not sent again.
"""

from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from models.hub_files import reason
from run_folder.secrets import redact
from safe_files import check_inside

NO_LOGIN = "no login found; `hf auth login`, or set HF_TOKEN"


@dataclass
class Upload:
    """Where a folder goes, and how."""

    repo: str  # USER/NAME
    private: bool = False
    revision: str | None = None
    message: str | None = None


def check_repo_name(name: str) -> None:
    """Raise UserError unless `name` is USER/NAME as the hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("the user or organisation is missing")
    except HFValidationError as error:
        raise UserError(f"--upload-repo {name}: give USER/NAME ({error})") from None


def files_to_upload(folder: str | Path) -> list[Path]:
    """The files of `folder` that go to the hub, relative to it. UserError for links out of it."""
    folder = Path(folder)
    found = []
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or relative.parts[0] == "checkpoints":
            continue
        check_inside(file, folder)
        if file.is_symlink() and file.is_dir():
            raise UserError(
                f"{file}: is a link to a folder, which is not followed; put the folder itself there"
            )
        if file.is_file():
            found.append(relative)
    if not found:
        raise UserError(f"{folder}: nothing in it to upload")
    return found


def describe_upload(folder: str | Path, upload: Upload, planned: dict[str, int]) -> str:
    """What an upload would send, for --dry-run; `planned`: name -> bytes of files to be written."""
    found = {f.as_posix(): (Path(folder) / f).stat().st_size for f in files_to_upload(folder)}
    files, sizes = zip(*sorted((found | planned).items()), strict=True)
    visibility = "private" if upload.private else "public, unless it exists as private"
    lines = [
        f"would upload {len(files)} files, {sum(sizes) / 1e6:.2f} MB, to {upload.repo} "
        f"({visibility}), revision {upload.revision or 'main'}:"
    ]
    lines += [f"  {size:>12,}  {file}" for file, size in zip(files, sizes, strict=True)]
    return "\n".join(lines)


def upload_folder(folder: str | Path, upload: Upload) -> str:
    """Send the folder; returns the address of the repository. UserError says why it failed."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    files = files_to_upload(folder)
    if get_token() is None:
        raise UserError(_failure(folder, upload, NO_LOGIN))
    api = HfApi(library_name="mlx-rlhf")
    try:
        # private=None leaves the account's own default, and an existing repository, as they are.
        private = True if upload.private else None
        url = api.create_repo(upload.repo, private=private, exist_ok=True)
        if upload.private and not api.repo_info(upload.repo).private:
            raise UserError(
                f"{upload.repo}: exists and is public, so nothing was uploaded; change "
                "it on the hub, or leave --private out"
            )
        if upload.revision:
            api.create_branch(upload.repo, branch=upload.revision, exist_ok=True)
        # File by file: upload_folder would take their names for patterns.
        api.create_commit(
            repo_id=upload.repo,
            operations=[CommitOperationAdd(f.as_posix(), Path(folder) / f) for f in files],
            revision=upload.revision,
            commit_message=upload.message or "Upload with mlx-rlhf",
        )
    except UserError:
        raise
    except Exception as error:  # network, server and validation faults come in many classes
        raise UserError(_failure(folder, upload, reason(root_cause(error)))) from error
    return str(url)


def root_cause(error: BaseException) -> BaseException:
    """The error of the hub or the network behind those that huggingface_hub wraps around it."""
    while error.__cause__ is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return error


def _failure(folder: str | Path, upload: Upload, why: str) -> str:
    again = f"python fuse.py --model {folder} --upload-repo {upload.repo}"
    again += " --private" if upload.private else ""
    again += f" --revision {upload.revision}" if upload.revision else ""
    again += f' --commit-message "{upload.message}"' if upload.message else ""
    return redact(
        f"upload to {upload.repo} failed: {why}. What was made is whole in {folder}; "
        f"to try again: {again}"
    )
