"""torch.compile of a transformer, block by block, and the time that compiling has taken."""

from __future__ import annotations

import time

from diffusers import SD3Transformer2DModel

MOST_VARIANTS = 64  # of a block: with and without gradient, several batch sizes, three kinds of blocks


class _Clock:
    """Seconds that this process has spent compiling, in forwards and backwards, whoever caused it."""

    def __init__(self) -> None:
        self.seconds, self._start, self._runs = 0.0, 0.0, False

    def run(self) -> None:
        """Let torch tell when it starts and ends compiling; outermost compilations alone are told."""
        from torch._dynamo import callback, config  # noqa: PLC0415  (takes seconds, and few need it)

        if not self._runs:
            self._runs = True
            config.recompile_limit = max(config.recompile_limit, MOST_VARIANTS)
            callback.on_compile_start(self._started)
            callback.on_compile_end(self._ended)

    def _started(self, _: object) -> None:
        self._start = time.perf_counter()

    def _ended(self, _: object) -> None:
        self.seconds += time.perf_counter() - self._start


_CLOCK = _Clock()


def compile_blocks(network: SD3Transformer2DModel) -> None:
    """Compile each block: blocks that are alike share their code, so that 24 take little longer than one."""
    _CLOCK.run()
    for block in network.transformer_blocks:
        block.compile()


def compile_seconds() -> float:
    """What compiling has taken in this process so far; differences of it are of interest."""
    return _CLOCK.seconds
