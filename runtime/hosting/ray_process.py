"""The process that starts and watches Ray's processes of one machine; see `ray_machine`.

    python -m runtime.hosting.ray_process JSON

Prints one line of JSON, {"address": "host:port"} of the head, when they are up. Ends them, and
itself, when its standard input is closed, at SIGTERM, or when one of them dies.

Ray's command line is not used: it turns a loopback address into that of an interface and listens at
all of them. `Node` is what that command, and `ray.cluster_utils`, start everything by; it is not
public, so the version of Ray is pinned and the system tests run through here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
from typing import Any, Final

from ray._private.node import Node
from ray._private.parameter import RayParams

from runtime.hosting.ray_machine import end_session

WATCH_S: Final = 0.5
_PR_SET_CHILD_SUBREAPER: Final = 36


class _Machine(Node):  # type: ignore[misc]  # Ray is untyped
    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        """No dashboard, nor the process that stands in for it."""


def main(arguments: dict[str, Any]) -> int:
    # The orphans of a raylet that was killed become our children, not init's: we can reap them.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    head = arguments["head"] is None
    parameters = RayParams(
        node_ip_address=arguments["host"],
        node_name=arguments["name"],
        gcs_address=arguments["head"],
        num_cpus=arguments["slots"],
        num_gpus=0,
        resources={},
        object_store_memory=arguments["object_store_bytes"],
        temp_dir=arguments["directory"],
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
        node_manager_port=0,
        min_worker_port=0,
        max_worker_port=0,
    )
    if head:
        parameters.gcs_server_port = arguments["port"]
    machine = None
    try:
        # With a reaper, since then the kernel ends Ray's processes if this one is killed.
        machine = _Machine(parameters, head=head, shutdown_at_exit=False, spawn_reaper=True)
        print(json.dumps({"address": machine.gcs_address}), flush=True)  # noqa: T201
        while not machine.dead_processes():
            if select.select([sys.stdin], [], [], WATCH_S)[0]:
                return 0
        print("ray ended:", machine.dead_processes(), file=sys.stderr)  # noqa: T201
        return 1
    finally:
        if machine is not None:
            machine.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        end_session(os.getpid())
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
