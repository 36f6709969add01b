"""What all tests need of the process: one thread each, and Ctrl-C as in a terminal."""

from __future__ import annotations

import signal

import torch

torch.set_num_threads(1)  # two cores are shared with whatever else runs
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs, and inherited
