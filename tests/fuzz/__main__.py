"""Damage good bytes in every way that comes to mind: nothing but ``PayloadError`` may come of them.

    python -m tests.fuzz [--seconds 300 | --runs 2000] [--seed 0] [--targets frame planes file message reply]

Targets take turns. An attempt is a finding if anything but ``PayloadError`` escapes; if it asks for more than
``--memory`` (of the address space, so that a large allocation fails where it is asked for); if it takes more than
``--slow`` seconds of the processor; or if what must hold afterwards does not: what is taken is finite, a model that
could not be filled is as it was, and a round gives what its good replies give. It ends with 1 if there are findings,
each with the command that repeats it.
"""

import argparse
import resource
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random

import torch

from tests.fuzz import targets


def main() -> int:
    """Run until the time or the number of runs is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="how long, unless --runs is given")
    parser.add_argument("--runs", type=int, help="how many attempts instead")
    parser.add_argument("--seed", type=int, default=0, help="of all attempts")
    parser.add_argument("--targets", nargs="+", help="which; all by default")
    parser.add_argument("--only", type=int, help="repeat the attempt of this number")
    parser.add_argument("--memory", type=int, default=512, help="MB that may be added to the process")
    parser.add_argument("--slow", type=float, default=10.0, help="seconds that an attempt may take")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = targets.make()
    chosen = {name: made[name] for name in options.targets or made}
    limited(options.memory)
    began = reported = time.monotonic()
    attempts, taken, found = Counter[str](), Counter[str](), dict[str, str]()
    number = -1 if options.only is None else options.only - 1
    try:
        while True:
            number += 1
            if (options.only is not None and number > options.only) or (
                options.runs is not None and number >= options.runs
            ):
                break
            if options.runs is None and time.monotonic() - began > options.seconds:
                break
            names = list(chosen)
            for name in names if options.only is not None else [names[number % len(names)]]:
                attempts[name] += 1
                started = time.process_time()
                try:
                    taken[name] += chosen[name](Random(f"{options.seed} {name} {number}"))  # noqa: S311
                    if time.process_time() - started > options.slow:
                        raise TimeoutError(f"it took {time.process_time() - started:.1f} s")
                except Exception as error:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    kind = f"{type(error).__name__} of {name} at {where.filename}:{where.lineno}"
                    if kind not in found:
                        again = f"python -m tests.fuzz --seed {options.seed} --targets {name} --only {number}"
                        found[kind] = again
                        print(f"\nFOUND {kind}\n{traceback.format_exc()}again: {again}", flush=True)
            if time.monotonic() - reported > 15:
                reported = time.monotonic()
                print(f"{reported - began:4.0f} s, {attempts.total()} attempts, {len(found)} findings", flush=True)
    except KeyboardInterrupt:
        print("stopped")
    for name in chosen:
        print(f"{name:<8} {attempts[name]:>8} attempts, of which {taken[name]} did no damage")
    print(f"{attempts.total()} attempts in {time.monotonic() - began:.0f} s, {len(found)} findings")
    return 1 if found else 0


def limited(megabytes: int) -> None:
    """Let this process have so much more memory than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    sys.exit(main())
