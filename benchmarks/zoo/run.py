"""All networks, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.common.process import quiet
from benchmarks.zoo.measure import SKIPPED, Row, measure
from benchmarks.zoo.networks import NETWORKS, Network
from benchmarks.zoo.table import verdict


def in_a_process(network: Network, timeout: float) -> Row:
    """Measure a network in a process of its own, for as long as is allowed."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(network.name, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(timeout):
            return ours.recv()
        return Row(network.name, network.task, reason=f"no result after {timeout:.0f} s")
    except EOFError:
        return Row(network.name, network.task, reason=f"the process ended with {process.exitcode}")
    finally:
        process.terminate()
        process.join()


def _measure_and_send(name: str, pipe: Any) -> None:
    quiet()
    pipe.send(measure(next(n for n in NETWORKS if n.name == name)))


def run(only: str, jobs: int, timeout: float) -> list[Row]:
    """All rows, in the order of the table; progress goes to stderr."""

    def one(network: Network) -> Row:
        if network.heavy and only.lower() != network.name.lower():
            return Row(network.name, network.task, SKIPPED, network.heavy, expected=True)
        return in_a_process(network, timeout)

    chosen = [n for n in NETWORKS if only.lower() in n.name.lower()]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.zoo.networks", "dpfix", "opacus"])
    with ThreadPoolExecutor(jobs) as pool:
        rows = []
        for row in pool.map(one, chosen):
            print(f"{row.name}: {verdict(row)} ({row.seconds:.0f} s)", file=sys.stderr, flush=True)
            rows.append(row)
    return rows
