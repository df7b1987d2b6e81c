"""Models of the Hugging Face hub: fetched into huggingface_hub's own cache, checked, and opened as a folder.

Only weights in safetensors, JSON files, templates and SentencePiece vocabularies are ever fetched: no code, no pickle.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arkinfer.artifact.tensors import TensorEntry, header_length, parse_header, read_header
from arkinfer.checkpoint.base import parse_object
from arkinfer.checkpoint.folder import INDEX, NO_PICKLE, PICKLES, SINGLE, FolderCheckpoint, check_index, read_text
from arkinfer.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SMALL = ("*.json", "*.jinja", "tokenizer.model")  # what is fetched besides weights; of the top folder only
_SMALL_BYTES = 64 << 20
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID = re.compile(rf"(?P<repository>{_NAME}/{_NAME})(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?")


@dataclass(frozen=True)
class HubModel:
    """The name of a model on the hub; ``revision`` is a branch, a tag or a commit."""

    repository: str
    revision: str = "main"


def parse_id(text: str, revision: str | None = None) -> HubModel | None:
    """Return the model that ``owner/name`` or ``owner/name@revision`` names, or None for any other text.

    Raises UserError where ``revision`` contradicts the one in the text.
    """
    match = _ID.fullmatch(text)
    if match is None or ".." in text:
        return None
    written = match["revision"]
    if written and revision and written != revision:
        raise UserError(f"{text} names one revision and --revision {revision} another", code="ARK-E161")
    if revision and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", revision):
        raise UserError(f"{revision!r} is not the name of a revision", code="ARK-E161")
    return HubModel(match["repository"], written or revision or "main")


class HubCheckpoint(FolderCheckpoint):
    """A snapshot of a model of the hub, complete in the local cache, or with ``headers_only`` without its weights."""

    def __init__(self, model: HubModel, offline: bool = False, headers_only: bool = False) -> None:
        self._model = model
        offline = offline or _forced_offline(model)
        fetched, shards = (_cached(model), []) if offline else _fetch(model, headers_only)
        self.headers_only = headers_only and not offline
        self.revision = fetched.name
        remote = _RemoteHeaders(model, fetched.name) if self.headers_only else None
        super().__init__(fetched, fetched.parent.parent, remote, shards)

    @property
    def name(self) -> str:
        return self._model.repository.partition("/")[2]

    @property
    def source(self) -> dict[str, Any]:
        return {"hub": self._model.repository, "revision": self.revision}


def _library(model: HubModel) -> HfApi:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError(
            f"there is no folder {model.repository}, and fetching it from the Hugging Face hub needs huggingface_hub",
            hint="pip install 'arkinfer[hub]'",
            code="ARK-E160",
        ) from error
    return HfApi(library_name="arkinfer")


def _forced_offline(model: HubModel) -> bool:
    _library(model)
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def _explained(model: HubModel) -> Iterator[None]:
    """Turn what the client raises into one error that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # also those of the client's HTTP library, whichever it uses
        raise _explain(model, error) from error


def _explain(model: HubModel, error: Exception) -> UserError:
    from huggingface_hub import errors

    name = model.repository
    if isinstance(error, errors.LocalEntryNotFoundError):
        return UserError(
            f"{name} at {model.revision} is not in the local cache",
            facts={"cache": _cache_folder()},
            hint="leave --offline out, and unset HF_HUB_OFFLINE, to fetch it once",
            code="ARK-E161",
        )
    if isinstance(error, errors.GatedRepoError):
        message, hint = f"{name} is gated", "accept its terms on its page, then: hf auth login"
    elif isinstance(error, errors.RevisionNotFoundError):
        message, hint = f"{name} has no revision {model.revision}", "leave the revision out for the newest"
    elif isinstance(error, errors.RepositoryNotFoundError):
        message = f"there is no folder {name}, and no model of that name on the hub that you may read"
        hint = "check the spelling; for a private model: hf auth login"
    else:
        message = f"{name} is no folder here, and could not be fetched from the hub"
        hint = "--offline uses a copy that was fetched before\nor fetch it elsewhere and give the folder"
    return UserError(message, facts={"reason": _reason(error)}, hint=hint, code="ARK-E161")


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return "".join(letter if letter.isprintable() else " " for letter in text)[:300]


def _cache_folder() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _cached(model: HubModel) -> Path:
    """Return the snapshot that the cache holds; FolderCheckpoint checks that it is complete."""
    from huggingface_hub import hf_hub_download

    with _explained(model):
        return Path(
            hf_hub_download(model.repository, "config.json", revision=model.revision, local_files_only=True)
        ).parent


def _fetch(model: HubModel, headers_only: bool) -> tuple[Path, list[str]]:
    """Fetch what the model consists of, all files of one commit; return the snapshot's folder and its weight files."""
    from huggingface_hub import hf_hub_download

    api = _library(model)
    with _explained(model):
        found = api.model_info(model.repository, revision=model.revision, files_metadata=True)
        commit, listed = str(found.sha), found.siblings or []
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise UserError(f"the hub answered with no commit for {model.repository}", code="ARK-E161")
    sizes = {item.rfilename: item.size for item in listed if re.fullmatch(_NAME, item.rfilename)}

    def fetch(name: str, revision: str = commit) -> Path:
        with _explained(model):
            file = Path(hf_hub_download(model.repository, name, revision=revision))
        _check_size(model, name, file, sizes[name])
        return file

    small = [name for name in sizes if any(fnmatchcase(name, pattern) for pattern in SMALL)]
    if "config.json" not in small:
        raise UserError(f"{model.repository} has no config.json", facts=_contents(sizes), code="ARK-E122")
    large = [name for name in small if (sizes[name] or 0) > _SMALL_BYTES]
    if large:
        raise UserError(f"{large[0]} is too long for what it is", facts={"bytes": sizes[large[0]]}, code="ARK-E122")
    snapshot = fetch("config.json", model.revision).parent  # by its name: this is what --offline finds again
    if snapshot.name != commit:
        raise UserError(f"{model.repository} changed while it was fetched", hint="run it again", code="ARK-E161")
    for name in sorted(set(small) - {"config.json"}):
        fetch(name)
    if INDEX in small:
        index = check_index(parse_object(read_text(snapshot / INDEX), INDEX), INDEX)
        shards = sorted(set(index.values()))
    else:
        others = sorted(name for name in sizes if name.endswith(".safetensors"))
        shards = [SINGLE] if SINGLE in sizes or not others else others  # packers choose names of their own
    missing = [name for name in shards if name not in sizes]
    if missing:
        pickles = any(name.endswith(PICKLES) for name in sizes)
        raise UserError(
            f"{model.repository} lacks {len(missing)} of {len(shards)} safetensors files",
            facts={"missing": ", ".join(missing[:8]), **_contents(sizes)},
            hint=NO_PICKLE if pickles else "another revision may have them: --revision",
            code="ARK-E123",
        )
    if not headers_only:
        _check_space(model, snapshot, {name: sizes[name] or 0 for name in shards})
        for name in shards:
            fetch(name)
    return snapshot, shards


def _contents(sizes: dict[str, int | None]) -> dict[str, str]:
    weights = [name for name in sizes if name.endswith((".safetensors", ".gguf", *PICKLES))]
    return {"it has": ", ".join(sorted(weights)[:8]) or "no weights"}


def _check_size(model: HubModel, name: str, file: Path, size: int | None) -> None:
    found = file.stat().st_size
    if size is not None and found != size:
        raise UserError(
            f"{name} of {model.repository} was not fetched whole",
            facts={"bytes": found, "the hub says": size, "file": file},
            hint=f"rm {file.resolve()}\nand build again",
            code="ARK-E123",
        )


def _check_space(model: HubModel, snapshot: Path, sizes: dict[str, int]) -> None:
    wanted = sum(size for name, size in sizes.items() if not (snapshot / name).exists())
    free = shutil.disk_usage(snapshot).free
    if wanted > free:
        raise UserError(
            f"{model.repository} does not fit on the disk",
            facts={"to fetch": f"{wanted:,} bytes", "free": f"{free:,} bytes", "cache": _cache_folder()},
            hint="free some space, or set HF_HOME to a larger disk",
            code="ARK-E163",
        )


class _RemoteHeaders:
    """Reads the headers of weight files by range requests, as ``read_header`` does those of local ones."""

    def __init__(self, model: HubModel, commit: str) -> None:
        self._model, self._commit = model, commit

    def __call__(self, file: Path) -> dict[str, TensorEntry]:
        if file.exists():
            return read_header(file)
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        with _explained(self._model):
            url = hf_hub_url(self._model.repository, file.name, revision=self._commit)
            size = get_hf_file_metadata(url).size
            if size is None:
                raise UserError(f"the hub does not say how long {file.name} is", code="ARK-E161")
            length = header_length(self._range(url, 0, 8), size, file)
            return parse_header(self._range(url, 8, length), size, file)

    def _range(self, url: str, start: int, count: int) -> bytes:
        """Return ``count`` bytes from ``start`` on; a server that sends the whole file is not waited for."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        data = bytearray()
        headers = {**build_hf_headers(library_name="arkinfer"), "range": f"bytes={start}-{start + count - 1}"}
        with get_session().stream("GET", url, headers=headers) as response:
            if response.status_code != 206:
                raise UserError(
                    "the hub does not send parts of files",
                    facts={"status": response.status_code},
                    hint="arkinfer build fetches the whole model",
                    code="ARK-E161",
                )
            for piece in response.iter_bytes():
                data += piece
                if len(data) >= count:
                    break
        return bytes(data[:count])
