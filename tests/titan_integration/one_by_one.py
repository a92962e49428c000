"""Trains configs one after the other on the ranks that torchrun has started once.

torchrun ... one_by_one.py OUT CONFIG[,CONFIG...] [torchtitan flags]

Each has a folder of its name below OUT, and goes on from the checkpoint that is there.  Each is
trained by a fork, as the host keeps meshes of the one before.
"""

import os
import sys

from torchtitan import train

_, out, names, *flags = sys.argv
for number, name in enumerate(names.split(",")):
    if not (child := os.fork()):
        # Under which ranks find each other at torchrun's store: as if it had started them again.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        sys.argv = ["train", f"--config={name}", f"--dump_folder={out}/{name}", *flags]
        train.main()
        sys.exit()
    if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(status)
