"""The same seeded workloads through us, over HTTP, and through every peer that is installed, in turn and warm.

    python load_tests/peers.py [--workloads zipf,single] [--rounds 7] [--quick]
    python load_tests/peers.py --all [--quick]     # and limit.py, budgets.py, growth.py, quality.py

Writes `docs/results/peers.json` and the page `docs/results.md`; what is not measured now stays as it was. A peer whose
package is missing (`pip install -c constraints.txt '.[peers]'`) is named and left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from child import Child, DeclinedError
from contenders import Contender, OpenVino, Peft, TransformersBatching
from figures import Bound, Series, in_turn
from results import OURS, Run, options
from served import Served, served
from workloads import WORKLOADS, Measures, Workload, check_prompts, measures_of

from server.engine.model_runner import native_dtype
from server.model_files import cache_dir, find_model

OURS_INT8 = f"{OURS} --quantize int8"
ONE_BY_ONE, GROUPED = "PEFT", "PEFT by task"
TRANSFORMERS, OPENVINO = "transformers", "OpenVINO GenAI"
BOUNDS = {
    "zipf": (
        Bound("mixed tasks over HTTP against PEFT grouped by task", OURS, GROUPED, at_least=12),
        Bound("mixed tasks over HTTP in int8 against PEFT grouped by task", OURS_INT8, GROUPED, at_least=12),
        Bound("mixed tasks over HTTP against OpenVINO GenAI without prefixes", OURS, OPENVINO, at_least=1),
        Bound("mixed tasks over HTTP in int8 against OpenVINO GenAI without prefixes", OURS_INT8, OPENVINO, at_least=1),
    ),
    "single": (
        Bound("single stream against OpenVINO GenAI's", OURS, OPENVINO, at_least=0.7),
        Bound("single stream in int8 against OpenVINO GenAI's", OURS_INT8, OPENVINO, at_least=0.7),
    ),
}


class Ours:
    """A server of ours as a contender."""

    def __init__(self, server: Served, measures: Measures) -> None:
        self._server, self._measures = server, measures

    def prepare(self, workload: Workload) -> str:
        self._server.publish(workload.tasks, self._measures)
        if not workload.is_first_token:
            return ""
        self._server.streams([workload.lead or workload.asks[0]], workload.num_out)
        (answer,) = self._server.streams(workload.asks, workload.num_out)
        return f"{answer.details['cached_tokens']} cached tokens"

    def run(self, workload: Workload) -> float:
        if workload.lead is not None:
            self._server.streams([workload.lead], workload.num_out)
        if workload.is_first_token:
            (answer,) = self._server.streams(workload.asks, workload.num_out)
            return workload.figure(1, answer.tokens_s[0])
        seconds = self._server.seconds(workload.asks, workload.num_out, workload.num_at_once)
        return workload.figure(len(workload.asks), seconds)


def room_for(workload: Workload, measures: Measures, dtype: torch.dtype) -> tuple[str, ...]:
    """The options of a server with room for just so many of the workload's tasks."""
    if workload.num_resident is None:
        return ()
    return (
        "--prefix-bytes",
        str(workload.num_resident * measures.kv_bytes(workload.tasks[0].num_virtual_tokens, dtype)),
    )


def compete(
    name: str, contenders: Mapping[str, Contender | Child], rounds: int, quick: bool
) -> tuple[Workload, dict[str, Series]]:
    """One workload through all; who cannot do it has no values and a note that says why."""
    make = WORKLOADS[name]
    workload = make(quick, 0)
    notes: dict[str, str] = {}
    able: dict[str, Contender | Child] = {}
    for contender_name, contender in contenders.items():
        try:
            notes[contender_name] = contender.prepare(workload)
            contender.run(workload)
            able[contender_name] = contender
        except DeclinedError as error:
            notes[contender_name] = str(error)

    def run(contender: Contender | Child, turn: int) -> float:
        return contender.run(make(quick, 1 + turn))

    found = in_turn({each: partial(run, able[each]) for each in able}, rounds, num_warm=0)
    return workload, {each: replace(found.get(each, Series(())), note=notes[each]) for each in contenders}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="names, with commas")
    parser.add_argument("--all", action="store_true", help="limit.py, budgets.py, busy.py and growth.py as well")
    arguments = options(parser, rounds=7)
    names = arguments.workloads.split(",")
    if unknown := set(names) - set(WORKLOADS):
        parser.error(f"expected workloads of {', '.join(WORKLOADS)}, got {', '.join(unknown)}")
    run_peers(Run.of("peers", arguments), names)
    if arguments.all:
        for script in ("limit.py", "budgets.py", "busy.py", "growth.py", "quality.py"):
            subprocess.run([sys.executable, str(Path(__file__).parent / script), *arguments.given], check=True)


def run_peers(run: Run, names: list[str]) -> None:
    files = find_model(None)
    dtype = native_dtype("auto", torch.device("cpu"))
    measures = measures_of(files.path)
    check_prompts(files.path)
    with ExitStack() as stack:
        children: dict[str, Child] = {
            ONE_BY_ONE: Child(partial(Peft, files.path, dtype, is_grouped=False)),
            GROUPED: Child(partial(Peft, files.path, dtype, is_grouped=True)),
            TRANSFORMERS: Child(partial(TransformersBatching, files.path, dtype)),
            OPENVINO: Child(partial(OpenVino, cache_dir())),
        }
        for child in children.values():
            stack.callback(child.close)
        for name in names:
            room = room_for(WORKLOADS[name](run.is_quick, 0), measures, dtype)
            with served(*room) as server, served(*room, "--quantize", "int8") as in_8_bits:
                ours = {OURS: Ours(server, measures), OURS_INT8: Ours(in_8_bits, measures)}
                contenders = {**ours, **children}
                workload, series = compete(name, contenders, run.rounds, run.is_quick)
            run.keep(name, workload.title, workload.unit, series, BOUNDS.get(name, ()))
    run.finish()


if __name__ == "__main__":
    main()
