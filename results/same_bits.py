"""Whether two versions of a script train the same agents: same_bits.py OLD SCRIPT ...

OLD is a commit. Each script of it, and the script as it is now, train with the same short settings,
and the arrays of both models must have equal bits. It takes a minute a script. measure.EQUAL names
the versions for which that was found.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tyro
from measure import CARTPOLE, PENDULUM, ROOT, SWITCHES, code_of

SHORT = "--total-timesteps 12800 --learning-starts 1000 --eval-episodes 1"
PLAIN = "--tau 1 --target-network-frequency 500 --no-anneal-lr --no-layer-norm"
SETTINGS = [SHORT, f"{SHORT} {PLAIN}", f"{SHORT} {SWITCHES['one-step targets']} {PLAIN}"]


def model(folder, script, flags):
    """The arrays that a script in a folder trains."""
    with tempfile.TemporaryDirectory() as parent:
        command = [sys.executable, script, *flags.split(), "--output-dir", f"{parent}/run"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, check=True, capture_output=True, env=environment)
        return dict(np.load(f"{parent}/run/model.npz"))


def main(old: tyro.conf.Positional[str], scripts: tyro.conf.Positional[tuple[str, ...]]) -> None:
    """Compare. Exit status 1 if a bit differs."""
    equal = True
    for script in scripts:
        settings = SETTINGS[:2] if script == PENDULUM else SETTINGS  # it has no --n-step
        if script == CARTPOLE:  # several agents at once, as measure.py trains them
            settings = [f"{flags} --num-seeds 3" for flags in SETTINGS]
        with tempfile.TemporaryDirectory() as folder:
            command = ["git", "-C", ROOT, "show", f"{old}:{script}"]
            Path(folder, script).write_bytes(subprocess.run(command, stdout=-1, check=True).stdout)
            for flags in settings:
                before = model(folder, script, flags)
                after = model(ROOT, script, flags)
                same = before.keys() == after.keys()
                same = same and all(np.array_equal(before[name], after[name]) for name in before)
                print(f"{script} {flags}: {'equal' if same else 'different'}")
                equal = equal and same
        print(f"{script} is now {code_of(script)}")
    sys.exit(not equal)


if __name__ == "__main__":
    tyro.cli(main)
