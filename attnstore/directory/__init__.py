"""The directory of a cluster: its contract, implementations in memory and on Redis or Valkey, and the view computed from it."""

from attnstore.directory.base import Directory
from attnstore.directory.factory import checked_directory, load_cluster_key, open_directory
from attnstore.directory.members import (
    EventBatch,
    Intent,
    LayoutRecord,
    Member,
    Membership,
    NodeState,
    Revision,
)
from attnstore.directory.memory import MemoryDirectory
from attnstore.directory.url import DirectoryUrl, is_directory_url
from attnstore.directory.view import ClusterView, ViewTracker

__all__ = [
    "ClusterView",
    "Directory",
    "DirectoryUrl",
    "EventBatch",
    "Intent",
    "LayoutRecord",
    "Member",
    "Membership",
    "MemoryDirectory",
    "NodeState",
    "Revision",
    "ViewTracker",
    "checked_directory",
    "is_directory_url",
    "load_cluster_key",
    "open_directory",
]
