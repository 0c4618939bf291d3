"""From the start of the server to its readiness, with the mini checkpoint's bundle.

python benchmarks/load_time.py [--starts N]
"""

from __future__ import annotations

from statistics import median

from harness import Row, arguments, finish
from mini_server import mini_bundle, server_on

GOAL_S = 8.0


def main() -> None:
    options = arguments(str(__doc__), starts={"type": int, "default": 3, "help": "how often it is started"})
    bundle, seconds = mini_bundle(), list[float]()
    for _ in range(1 if options.tiny else options.starts):
        with server_on(bundle) as server:
            seconds.append(server.ready_seconds)
    took = median(seconds)
    more = {"seconds": took, "goal": f"at most {GOAL_S:g} s", "all": ", ".join(f"{value:.1f}" for value in seconds)}
    row = Row("start to ready, mini checkpoint", 1000 * took, more=more)
    row.note = "reached" if took <= GOAL_S else "not reached"
    finish("load_time", [row], options, None, f"the goal of {GOAL_S:g} s is {row.note}")


if __name__ == "__main__":
    main()
