"""What an ensemble of five costs against one request, over HTTP, when the batch has room.

Five members of 10 to 30 virtual tokens on the default model, 32 tokens in and 32 out, greedy, EOS ignored; pairs are
interleaved, the end has the medians of their ratios with the range.

    python load_tests/ensemble_cost.py [--pairs 9] [--dtype auto]
"""

from __future__ import annotations

import argparse
from functools import partial

from figures import in_turn
from served import Served, served
from workloads import NUM_IN, NUM_OUT, Task, asks_of, measures_of

from server.model_files import find_model

NUM_MEMBERS = 5
RULES = ("mean_probs", "vote")


def seconds(server: Served, task: Task, turn: int) -> float:
    return server.seconds(asks_of([task], turn=turn), NUM_OUT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    members = [Task(f"m{i}", num_virtual_tokens=10 + 5 * i, seed=i) for i in range(NUM_MEMBERS)]
    with served("--dtype", arguments.dtype) as server:
        server.publish(members, measures_of(find_model(None).path))
        for rule in RULES:
            names = [f"{member.name}@1" for member in members]
            server.put(rule, json={"kind": "ensemble", "members": names, "rule": rule})
        tasks = {"one": members[2]} | {rule: Task(rule) for rule in RULES}
        measures = {name: partial(seconds, server, task) for name, task in tasks.items()}
        found = in_turn(measures, arguments.pairs, num_warm=2)
        dtype = server.get("/info")["model_dtype"]
    print(f"{dtype}, {NUM_MEMBERS} members, {NUM_IN} in, {NUM_OUT} out, {arguments.pairs} pairs")
    for rule in RULES:
        print(f"{rule}: {found[rule].over(found['one'])} times one request")


if __name__ == "__main__":
    main()
