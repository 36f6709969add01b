"""What a short grid is worth: Kendall's tau with the final order, and regret, by share of the budget."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.style import INK, MUTED, metric_label


def rank_plot(stability: pd.DataFrame, metric: str) -> Figure:
    """`stability` is ranks.stability."""
    figure = Figure(figsize=(7.0, 2.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    share = 100 * stability["share"]
    left.fill_between(share, stability["low"], stability["high"], color="#0072B2", alpha=0.18, linewidth=0)
    left.plot(share, stability["tau"], color="#0072B2", marker="o", markersize=4.5)
    left.axhline(0, color=MUTED, linewidth=0.9)
    left.set(ylabel="Kendall's tau with the final order", ylim=(min(-0.05, stability["low"].min()), 1.02))
    right.plot(share, stability["regret"], color="#D55E00", marker="s", markersize=4.5, linestyle=(0, (5, 2)))
    right.set(ylabel=f"lost by taking the leader\n({metric_label(metric)})", ylim=(0, None))
    for ax in (left, right):
        ax.set(xlabel="share of the common budget, %", xlim=(0, 100))
    left.set_title(f"{stability['configurations'].iloc[0]} configurations", loc="left", color=INK)
    return figure
