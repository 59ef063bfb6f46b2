"""The Ray cluster: an existing one, or one of this machine alone; quiet, since the driver tells what there is to tell."""

import logging
import os
import re
import socket

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stages.lib.errors import UserError
from sweep.task import blind

STORE = 256 * 1024**2  # bytes of a local object store: only the code and the results pass through it


def address(given: str | None) -> str | None:
    """Of the cluster to use; None: there is none."""
    return given or os.environ.get("RAY_ADDRESS")


def connect(given: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    where = address(given)
    try:
        if where and (match := re.search(r"([^/]+):(\d+)$", where)):  # Ray tries for minutes, and fills the screen
            socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=10).close()
        if where:
            ray.init(address=where, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, object_store_memory=STORE, **quiet)
    except Exception as error:  # Ray raises many kinds, and none says more than its words
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"no Ray cluster at {where or 'this machine'} ({words}); is it started, with this Ray?"
        ) from error


def leave() -> None:
    """Ends this sweep's tasks, and the cluster if it was started here."""
    ray.shutdown()


def has_gpus() -> bool:
    return ray.cluster_resources().get("GPU", 0) > 0


def check_sees(token: str) -> None:
    """Refuse a machine that runs tasks and does not see the token. (One that joins later is told by its tasks.)"""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)]
    look = ray.remote(os.path.exists)
    there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    seen = ray.get([look.options(num_cpus=0, scheduling_strategy=where).remote(token) for where in there])
    if not all(seen):
        names = sorted({node["NodeManagerHostname"] for node, sees in zip(nodes, seen, strict=True) if not sees})
        raise UserError(f"{', '.join(names)}: {blind(token)}")


def check(cpus: float, gpus: float, may_grow: bool) -> None:
    """Refuse, or say that it waits for, a machine that is large enough."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(found.get("CPU", 0) >= cpus and found.get("GPU", 0) >= gpus for found in nodes):
        return
    words = f"no machine has the {cpus:g} CPUs and {gpus:g} GPUs of a training"
    if not may_grow:
        raise UserError(f"{words}: lower --cpus-per-training or --gpus-per-training")
    print(f"{words} yet: waiting for one", flush=True)
