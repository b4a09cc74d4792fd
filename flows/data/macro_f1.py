# Shape letters are upper case.
"""How well labels are told apart, rare ones as important as frequent ones.

Shape letters: C labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def macro_f1(confusion_CC: NDArray[np.int64]) -> float:
    """Mean over the labels of F1, the harmonic mean of precision and recall.

    Labels that neither occur nor were named are left out, as scikit-learn does.

    Args:
        confusion_CC: How many texts of label i were taken for label j.
    """
    right, sizes = confusion_CC.diagonal(), confusion_CC.sum(0) + confusion_CC.sum(1)
    return float((2 * right[sizes > 0] / sizes[sizes > 0]).mean())


def by_label(confusion_CC: NDArray[np.int64], names: list[str]) -> dict[str, dict[str, Any]]:
    """Of each label: its texts, the share of them that was recognized, and the share that is right of what was named.

    Args:
        confusion_CC: As in `macro_f1`.
        names: Of the labels.
    """
    texts, named, right = confusion_CC.sum(1), confusion_CC.sum(0), confusion_CC.diagonal()
    return {
        name: {
            "texts": int(texts[i]),
            "recall": float(right[i] / texts[i]) if texts[i] else None,
            "precision": float(right[i] / named[i]) if named[i] else None,
        }
        for i, name in enumerate(names)
    }
