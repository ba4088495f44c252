"""All networks, each in a process of its own."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.common.process import quiet
from benchmarks.zoo.measure import SKIPPED, Row, measure
from benchmarks.zoo.network import Network
from benchmarks.zoo.table import verdict


def in_a_process(network: Network, module: str, timeout: float, opacus: bool) -> Row:
    """Measure a network in a process of its own, for as long as is allowed."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(network.name, module, opacus, theirs))
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


def _measure_and_send(name: str, module: str, opacus: bool, pipe: Any) -> None:
    quiet()
    networks = importlib.import_module(module).NETWORKS
    pipe.send(measure(next(n for n in networks if n.name == name), opacus))


def run(
    module: str,
    only: str,
    jobs: int,
    timeout: float,
    *,
    opacus: bool = True,
    done: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """All rows of a module's networks, in the order of the table; progress goes to stderr.

    Args:
        done: told each row as soon as it is there.
    """

    def one(network: Network) -> Row:
        if network.heavy and only.lower() != network.name.lower():
            return Row(network.name, network.task, SKIPPED, network.heavy, expected=True)
        return in_a_process(network, module, timeout, opacus)

    networks: Sequence[Network] = importlib.import_module(module).NETWORKS
    chosen = [n for n in networks if only.lower() in n.name.lower()]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module, "dpfix", "opacus"])
    with ThreadPoolExecutor(jobs) as pool:
        rows = []
        for row in pool.map(one, chosen):
            print(f"{row.name}: {verdict(row)} ({row.seconds:.0f} s)", file=sys.stderr, flush=True)
            done(row)
            rows.append(row)
    return rows
