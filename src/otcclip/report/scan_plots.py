"""Histograms of a scan's scores, as SVG: stacked by what was done with the pairs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, BASE = 480.0, 150.0, 130.0


def histogram_svg(edges: NDArray[np.floating], counts: Mapping[str, NDArray[np.integer]]) -> str:
    """Bars from left (least suspicious) to right; heights are square roots, so that a few among many can be seen."""
    total = sum(counts.values(), np.zeros(len(edges) - 1))
    most = max(1.0, float(np.sqrt(total).max()))
    step = WIDTH / (len(edges) - 1)
    bars = []
    for i, whole in enumerate(total):
        height, y = float(np.sqrt(whole)) / most * (BASE - 8), BASE
        for name, count in counts.items():
            part = height * float(count[i]) / float(whole) if whole else 0.0
            if part:
                y -= part
                place = f'x="{i * step:.1f}" y="{y:.1f}" width="{step - 0.8:.1f}" height="{part:.1f}"'
                bars.append(f'<rect class="{name}" {place}/>')
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img">{"".join(bars)}'
        f'<line x1="0" x2="{WIDTH:g}" y1="{BASE:g}" y2="{BASE:g}"/>'
        f'<text x="0" y="{HEIGHT - 5:g}">{edges[0]:.3g}</text>'
        f'<text x="{WIDTH:g}" y="{HEIGHT - 5:g}" text-anchor="end">{edges[-1]:.3g}</text></svg>'
    )
