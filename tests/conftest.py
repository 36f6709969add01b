"""Threads: tests share two cores with whatever else runs."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
