"""The artifact: one folder that holds everything a device needs, sealed by digests."""

from arkinfer.artifact.manifest import SCHEMA, FileEntry, Manifest
from arkinfer.artifact.store import Artifact, Writer

__all__ = ["SCHEMA", "Artifact", "FileEntry", "Manifest", "Writer"]
