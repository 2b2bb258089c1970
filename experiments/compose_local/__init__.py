"""`docker-compose.yml` on a machine without a container engine.

Each service runs its own command, with its own environment, user, mounts and health check, as a process in namespaces of its own,
under its own host name. Executables of this machine replace the images (`executables.py`).
"""

from experiments.compose_local.cluster import ComposeCluster, ServiceFailed
from experiments.compose_local.compose_file import ComposeError, load_compose_file

__all__ = ["ComposeCluster", "ComposeError", "ServiceFailed", "load_compose_file"]
